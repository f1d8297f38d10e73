"""What a stage trains with: its loader, optimiser and schedule."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from dynnet.errors import RecipeError
from dynnet.learning.data import Data, Loader
from dynnet.learning.processes import World
from dynnet.learning.recipes import Recipe, StageConfig
from training.state import saved


@dataclass(frozen=True)
class Tools:
    """What a stage trains with."""

    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: Loader


def make_tools(trained: nn.Module, config: StageConfig, name: str, recipe: Recipe, data: Data, here: World) -> Tools:
    """Build a stage's loader, optimiser and schedule.

    Raises:
        DataError, RecipeError: the stage's settings do not work.
    """
    loader = data.train_loader(config.batch_size, seed=recipe.seed, rank=here.rank, world=here.size)
    if (recipe.mixup or recipe.cutmix) and config.batch_size // here.size % 2:
        raise RecipeError(f"mixup pairs images: {name}.batch_size={config.batch_size} must be even in every process")
    try:
        optimizer = create_optimizer_v2(
            trained,
            config.opt,
            config.lr,
            config.weight_decay,
            config.momentum,
            filter_bias_and_bn=not config.decay_norms,
            param_group_fn=_gates_apart if config.decay_norms else None,
        )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup * config.epochs,
            warmup_lr=config.lr / 100,
            min_lr=config.lr * config.final_lr,
            # Else timm's: decays at epochs 90, 180 ..., and of a polynomial the tenth root.
            decay_epochs=config.epochs / 3,
            decay_milestones=(config.epochs / 2, 3 * config.epochs / 4),
            decay_rate=1.0 if config.sched == "poly" else 0.1,
            step_on_epochs=False,
            updates_per_epoch=len(loader),
        )
        _try_out(config, here)
    except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError, RuntimeError, ImportError) as error:
        raise RecipeError(f"stage {name!r} cannot be run, and checkpointed, with {config}: {error}") from error
    return Tools(optimizer, scheduler, loader)


def _try_out(config: StageConfig, here: World) -> None:
    """One step of an optimiser like that of a stage, and what a checkpoint would hold of it: some need a GPU, a second
    backward, or keep what is neither a tensor nor JSON."""
    with torch.random.fork_rng(devices=[]):
        weights = [nn.Parameter(torch.ones(2, 2, device=here.device)), nn.Parameter(torch.ones(2, device=here.device))]
        optimizer = create_optimizer_v2(weights, config.opt, config.lr, config.weight_decay, config.momentum)
        torch.stack([w.square().sum() for w in weights]).sum().backward()
        optimizer.step()
        json.dumps(saved(optimizer)[1])


def _gates_apart(trained: nn.Module) -> list[dict[str, Any]]:
    """Everything decays but the gates."""
    named = list(trained.named_parameters())
    gates = [p for name, p in named if name.startswith("gates.")]
    rest = [p for name, p in named if not name.startswith("gates.")]
    return [{"params": rest}, *([{"params": gates, "weight_decay": 0.0}] if gates else [])]
