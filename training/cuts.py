"""What each method of pruning aims at, and what a cut by it takes away.

A run goes from its dense model to its target in one or more cuts; after each, batch norms are measured anew. A new
method is a row of `METHODS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dynnet.backbone.dry_run import trace
from dynnet.backbone.host import prepare_
from dynnet.errors import CheckpointError, RecipeError
from dynnet.evaluation.threads import fit_threads
from dynnet.files.bundles import read_bundle
from dynnet.files.creation import pruned_shape
from dynnet.files.weights import check_weights
from dynnet.learning.data import Data, Loader
from dynnet.learning.processes import World
from dynnet.learning.recipes import PruningConfig, Recipe
from dynnet.pruning import (
    CRITERIA,
    prune,
    prune_layers,
    recalibrate_,
    removable_blocks,
    remove_blocks,
    rewind_,
    scheduled,
    sparsify_,
    sparsify_n_m_,
)
from dynnet.pruning.shape import bring_into_shape_
from dynnet.pruning.single_weights import SparsityScope
from training.compare import accuracy

_DEFAULTS = {"macs": 0.5, "sparsity": 0.8}


@dataclass(frozen=True)
class Cuts:
    """The cuts of a run.

    Attributes:
        recipe, data: of the run.
        create: what `timm.create_model` is called with.
        out: folder of the run.
        here: this process.
        target: what is aimed at, and its share.
    """

    recipe: Recipe
    data: Data
    create: dict[str, Any]
    out: Path
    here: World
    target: tuple[str, float]

    @property
    def config(self) -> PruningConfig:
        return self.recipe.pruning

    def rehearse(self, model: nn.Module) -> None:
        """Can the target be reached from this dense model?

        Raises:
            RecipeError, PruneError: it cannot.
        """
        METHODS[self.config.method].rehearse(self, model)

    def cut(self, model: nn.Module, number: int, dense: nn.Module) -> nn.Module:
        """The model that one cut leaves.

        Args:
            model: before the cut; may be changed.
            number: of the cut, from 1 on.
            dense: the model that the run began with.
        """
        model = METHODS[self.config.method].cut(self, model.eval(), number, dense)
        recalibrate_(model, self.sample(), self.config.recalibrate)
        return model

    def sample(self) -> Loader:
        """What criteria, batch norms and int8 ranges are shown."""
        return self.data.sample_loader(128, seed=self.recipe.seed)

    def goal(self, number: int) -> float:
        """The share of the dense model's MACs or time that one cut leaves, on the way to the target."""
        return self.target[1] ** (number / self.config.steps)


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        cut: called with the cuts, a model in eval mode, the number of the cut and the dense model; gives what is left.
        rehearse: called with the cuts and the dense model; fails where the target cannot be reached.
        aims: what it can aim at, the default first; none where the recipe's n and m say it all.
        at_once: can it only go in one step?
        single_weights: do weights go one by one, and no MACs with them?
    """

    cut: Callable[[Cuts, nn.Module, int, nn.Module], nn.Module]
    rehearse: Callable[[Cuts, nn.Module], None]
    aims: tuple[str, ...]
    at_once: bool = False
    single_weights: bool = False


def target_of(config: PruningConfig) -> tuple[str, float]:
    """What a method aims at ("macs", "latency" or "sparsity"), and its share.

    Raises:
        RecipeError: an unknown method, a target that it does not have, or more than one.
    """
    if config.method not in METHODS:
        raise RecipeError(f"pruning.method={config.method!r}: choose from {', '.join(METHODS)}")
    able = METHODS[config.method].aims
    given = {key: share for key in ("macs", "latency", "sparsity") if (share := getattr(config, key)) is not None}
    if len(given) > 1 or not set(given) <= set(able):
        told = ", ".join(f"{key}={share:g}" for key, share in given.items())
        aims = f"aims at {' or '.join(able)}; give one" if able else "has n and m in place of a target"
        raise RecipeError(f"pruning has {told}: {config.method!r} {aims}")
    if not able:
        return "sparsity", 1 - config.n / max(config.m, 1)
    return next(iter(given.items()), (able[0], _DEFAULTS[able[0]]))


# Channels.


def _cut_channels(cuts: Cuts, model: nn.Module, number: int, dense: nn.Module) -> nn.Module:
    kind = cuts.target[0]
    if kind == "latency":
        print(f"timed one image at a time: {fit_threads(dense, cuts.data.input_size, 1)}", flush=True)
    aim: dict[str, Any] = {kind: cuts.goal(number), "of": dense}
    return prune(model, cuts.sample(), **_settings(cuts, number), **aim)


def _cut_and_begin_anew(cuts: Cuts, model: nn.Module, number: int, dense: nn.Module) -> nn.Module:
    """New weights in the same shape, as timm initialises them, however the run got here."""
    thin = _cut_channels(cuts, model, number, dense)
    torch.manual_seed(cuts.recipe.seed + number)
    fresh = timm.create_model(**cuts.create)
    bring_into_shape_(fresh, pruned_shape(thin, cuts.create))
    prepare_(fresh, cuts.data.preparation)
    return fresh.to(cuts.here.device)


def _rehearse_channels(cuts: Cuts, model: nn.Module) -> None:
    kind, share = cuts.target
    looks = "slimming" if cuts.config.method == "slimming" else "random"  # neither looks at images
    prune(model, **{**_settings(cuts, 0), "criterion": looks, kind: share})


def _settings(cuts: Cuts, number: int) -> dict[str, Any]:
    """What `prune` is told for one cut, besides its target."""
    config = cuts.config
    return {
        **config.cut,
        "criterion": "l1" if config.method == "scratch" else config.method,
        "input_size": cuts.data.input_size,
        "seed": cuts.recipe.seed + number,
    }


# Blocks.


def _cut_blocks(cuts: Cuts, model: nn.Module, number: int, dense: nn.Module) -> nn.Module:
    size = cuts.data.input_size
    # A share of this model's MACs, from which earlier cuts may have taken more than they had to.
    left = min(1.0, _macs(cuts, dense) * cuts.goal(number) / _macs(cuts, model))
    return prune_layers(model, lambda shorter: accuracy(shorter, cuts.data, "calibration"), left, size)


def _rehearse_blocks(cuts: Cuts, model: nn.Module) -> None:
    shortest = remove_blocks(model, removable_blocks(model, cuts.data.input_size))
    least, share = _macs(cuts, shortest) / _macs(cuts, model), cuts.target[1]
    if not least <= share <= 1:
        raise RecipeError(f"pruning.macs={share}: without any of its blocks the model costs {least:.3f}")


def _macs(cuts: Cuts, model: nn.Module) -> int:
    return trace(model, cuts.data.input_size, 1).macs


# Single weights.


def _cut_weights(cuts: Cuts, model: nn.Module, number: int, dense: nn.Module) -> nn.Module:
    share = scheduled(cuts.config.schedule, cuts.target[1], number, cuts.config.steps)
    sparsify_(model, share, scope=_scope(cuts.config), exclude=cuts.config.exclude)
    return model


def _cut_and_rewind(cuts: Cuts, model: nn.Module, number: int, dense: nn.Module) -> nn.Module:
    model = _cut_weights(cuts, model, number, dense)
    rewind_(model, read_early(cuts.config.early or cuts.out / "early.safetensors", dense))
    return model


def _rehearse_weights(cuts: Cuts, model: nn.Module) -> None:
    sparsify_(copy.deepcopy(model), cuts.target[1], scope=_scope(cuts.config), exclude=cuts.config.exclude)


def read_early(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights that a lottery ticket goes back to.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or of another model.
    """
    tensors, about = read_bundle(path)
    if about.get("kind") != "early weights":
        raise CheckpointError(f"{str(path)!r} holds a {about.get('kind')}, not the early weights of a dense stage")
    check_weights(model, tensors, path)
    return tensors


def _scope(config: PruningConfig) -> SparsityScope:
    return "layer" if config.scope == "group" else "global"


def _cut_n_of_m(cuts: Cuts, model: nn.Module, number: int, dense: nn.Module) -> nn.Module:
    config = cuts.config
    left = sparsify_n_m_(model, config.n, config.m, exclude=config.exclude)
    if cuts.here.first and left:
        print(f"left dense, as {config.m} does not divide their inputs: {', '.join(left)}", flush=True)
    return model


def _rehearse_n_of_m(cuts: Cuts, model: nn.Module) -> None:
    sparsify_n_m_(copy.deepcopy(model), cuts.config.n, cuts.config.m, exclude=cuts.config.exclude)


_CHANNELS = Method(_cut_channels, _rehearse_channels, ("macs", "latency"))
_WEIGHTS = Method(_cut_weights, _rehearse_weights, ("sparsity",), single_weights=True)
METHODS: dict[str, Method] = {
    **dict.fromkeys(CRITERIA, _CHANNELS),
    "slimming": replace(_CHANNELS, at_once=True),
    "layers": Method(_cut_blocks, _rehearse_blocks, ("macs",)),
    "scratch": replace(_CHANNELS, cut=_cut_and_begin_anew, at_once=True),
    "magnitude": _WEIGHTS,
    "lottery": replace(_WEIGHTS, cut=_cut_and_rewind),
    "n:m": Method(_cut_n_of_m, _rehearse_n_of_m, (), at_once=True, single_weights=True),
}
