"""The loop of all training: epochs of updates, judged after each, with checkpoints that resume exactly.

B batch, K classes
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.errors import NonFiniteError, RecipeError
from dynnet.evaluation.threads import fit_threads
from dynnet.learning.data import Data, Loader
from dynnet.learning.recipes import Recipe, StageConfig
from training.distributed import SyncedBatchNorm, World
from training.state import Log, Position, State


@dataclass(frozen=True)
class Objective:
    """What one update minimises.

    Attributes:
        loss: a scalar.
        losses: of each classifier, for the log.
        metrics: what else is worth logging.
    """

    loss: Tensor
    losses: Tensor
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: for the log.
        config: its settings.
        model: all of it: what is put into train mode, saved, averaged and judged.
        trained: the part whose parameters learn; the others are frozen.
        called: the part that `forward` calls, whose gradients processes share.
        forward: (called, images (B, C, H, W), progress in [0, 1)) to whatever `objective` needs; under autocast, if the
            recipe wants that.
        objective: (that, labels (B,) or probabilities (B, K), progress in (0, 1]) to what is minimised.
        judge: what held-out images say of the model: "accuracy", and what else is worth logging.
        shown: the same in a line for people.
        still: modules that stay in eval mode.
        begins: called with the number of an epoch before its first step.
    """

    name: str
    config: StageConfig
    model: nn.Module
    trained: nn.Module
    called: nn.Module
    forward: Callable[[nn.Module, Tensor, float], Any]
    objective: Callable[[Any, Tensor, float], Objective]
    judge: Callable[[nn.Module], dict[str, Any]]
    shown: Callable[[dict[str, Any]], str]
    still: tuple[nn.Module, ...] = ()
    begins: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Tools:
    """What a stage trains with."""

    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: Loader


@dataclass(frozen=True)
class Desk:
    """Where a run works: its recipe, its data, and where it writes.

    Attributes:
        about: what its checkpoints say besides the position.
    """

    recipe: Recipe
    data: Data
    log: Log
    out: Path
    here: World
    about: dict[str, Any] = field(default_factory=dict)


def run_stage(stage: Stage, desk: Desk, begin: Position, state: State | None) -> None:
    """Train a stage, from its beginning or from a checkpoint within it.

    Args:
        stage: what is trained.
        desk: of the run.
        begin: the first step to do.
        state: the checkpoint to go on from; None at the beginning of a stage.
    """
    recipe, here, config, model = desk.recipe, desk.here, stage.config, stage.model
    tools = make_tools(stage.trained, config, stage.name, desk.recipe, desk.data, here)
    optimizer, scheduler, loader = tools.optimizer, tools.scheduler, tools.loader
    steps = len(loader)
    model.requires_grad_(False)
    stage.trained.requires_grad_(True)
    ema = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    if state is not None:
        state.restore(model, ema, optimizer)
    parallel = here.parallel(stage.called)
    mixup = _mixup(recipe, len(desk.data.classes))
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    exposed = at_risk(stage.trained) if here.device.type == "cpu" else []
    _tell_settings(stage, desk, exposed)

    def checkpoint(epoch: int, step: int) -> None:
        position = dataclasses.replace(begin, epoch=epoch, step=step)
        State.write(desk.out, position, model, ema, optimizer, desk.log, here, desk.about)

    for epoch in range(begin.epoch, config.epochs):
        first_step = begin.step if epoch == begin.epoch else 0
        began = time.monotonic()
        if stage.begins is not None and first_step == 0:
            stage.begins(epoch)
        model.train()
        for module in stage.still:
            module.eval()
        bar = tqdm(
            loader.epoch(10_000 * begin.stage + epoch, first_step),
            f"{stage.name} {epoch + 1}/{config.epochs}",
            steps,
            initial=first_step,
            leave=False,
            disable=None if here.first else True,
        )
        for step, batch in enumerate(bar, first_step):
            update = epoch * steps + step
            _seed(recipe.seed, begin.stage, update, here.rank)
            if scheduler is not None:
                scheduler.step_update(update)
            images = batch.images.to(here.device, memory_format=layout)
            target = batch.labels.to(here.device)
            if mixup is not None:
                images, target = mixup(images, target)

            with _forward_context(recipe, here), right_gradients(exposed):
                given = stage.forward(parallel, images, update / (steps * config.epochs))
            found = stage.objective(given, target, (update + 1) / (steps * config.epochs))
            _refuse_non_finite(found, stage.name, epoch, step)

            optimizer.zero_grad(set_to_none=True)
            found.loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(stage.trained.parameters(), config.clip_grad)
            optimizer.step()
            if ema is not None:
                ema.update(model, step=update)

            bar.set_postfix_str(f"loss {found.loss.item():.3f}", refresh=False)
            if step % recipe.log_steps == 0:
                record = {"kind": "step", "stage": stage.name, "epoch": epoch, "step": step}
                mean = here.sum(found.losses.detach().clone()) / here.size
                rate = optimizer.param_groups[0]["lr"]
                desk.log.write({**record, "lr": rate, "losses": mean.tolist(), **found.metrics})
            if (step + 1) % recipe.checkpoint_steps == 0 and step + 1 < steps:
                checkpoint(epoch, step + 1)
        said = stage.judge(ema.module if ema is not None else model)
        seconds = time.monotonic() - began
        desk.log.write({"kind": "epoch", "stage": stage.name, "epoch": epoch, **said, "seconds": round(seconds, 1)})
        if here.first:
            shown = stage.shown(said)
            print(f"{stage.name} {epoch + 1}/{config.epochs}: held-out accuracy {shown}, {seconds:.1f} s", flush=True)
        checkpoint(epoch + 1, 0)
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    model.requires_grad_(True)


def _tell_settings(stage: Stage, desk: Desk, exposed: Sequence[str]) -> None:
    """Choose threads for a stage's steps, and say how it runs."""
    here = desk.here
    threads = fit_threads(stage.model, desk.data.input_size, stage.config.batch_size // here.size)
    if not here.first:
        return
    print(f"{stage.name}: {threads}", flush=True)
    if exposed and desk.recipe.channels_last:
        print(
            f"{stage.name}: not in channels_last, where some CPUs get their gradients wrong: {', '.join(exposed)}",
            flush=True,
        )


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
            step_on_epochs=False,
            updates_per_epoch=len(loader),
        )
    except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"timm cannot set up stage {name!r} with {config}: {error}") from error
    return Tools(optimizer, scheduler, loader)


def _gates_apart(trained: nn.Module) -> list[dict[str, Any]]:
    """Everything decays but the gates."""
    named = list(trained.named_parameters())
    gates = [p for name, p in named if name.startswith("gates.")]
    rest = [p for name, p in named if not name.startswith("gates.")]
    return [{"params": rest}, *([{"params": gates, "weight_decay": 0.0}] if gates else [])]


@contextmanager
def _forward_context(recipe: Recipe, here: World) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(here.device.type, torch.bfloat16, enabled=recipe.amp))
        if here.size > 1:
            stack.enter_context(SyncedBatchNorm())
        yield


def _seed(*key: int) -> None:
    """Dropout, drop path and mixup depend on the position alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)


def _refuse_non_finite(found: Objective, stage: str, epoch: int, step: int) -> None:
    if not math.isfinite(found.loss.item()):
        raise NonFiniteError(
            f"the loss is {found.loss.item()} in stage {stage!r}, epoch {epoch + 1}, step {step + 1} (classifiers: "
            f"{[round(x, 4) for x in found.losses.tolist()]}); lower {stage}.lr, set {stage}.clip_grad, or look at the "
            f"images. The last checkpoint is untouched"
        )


def _mixup(recipe: Recipe, classes: int) -> Mixup | None:
    if recipe.mixup == recipe.cutmix == 0:
        return None
    # Labels are smoothed once, in the loss.
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)
