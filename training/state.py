"""Checkpoints of a run, from which it goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dynnet.errors import CheckpointError
from dynnet.files.bundles import read_bundle, write_bundle
from dynnet.files.creation import pruned_shape
from dynnet.files.weights import load_weights_
from dynnet.learning.processes import World
from dynnet.learning.recipes import StageConfig
from dynnet.pruning.shape import Shape, bring_into_shape_
from dynnet.schema import shown, typed
from training.identity import check_same
from training.log import Log


@dataclass(frozen=True)
class Position:
    """The next step to do."""

    stage: int = 0
    epoch: int = 0
    step: int = 0

    @property
    def inside(self) -> bool:
        """Has its stage begun?"""
        return self.epoch > 0 or self.step > 0


class Saved(TypedDict):
    """An optimiser, but for its tensors: what it knows of each parameter, and the settings of their groups."""

    state: dict[str, dict[str, int | float | bool | None]]
    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class Description:
    """What a checkpoint says besides its tensors.

    Attributes:
        program, recipe, splits, preparation: what the run is, see `training.identity`.
        position: where it goes on.
        optimizer: within a stage; of no groups between two.
        log_bytes: how long the log was.
        shape: of the backbone: what pruning had made of it.
        masked: layers with masks on their weights.
    """

    kind: Literal["state"]
    program: str
    recipe: dict[str, Any]
    splits: dict[str, dict[str, int | str]]
    preparation: dict[str, Any]
    position: Position
    optimizer: Saved
    log_bytes: int
    shape: Shape
    masked: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("program", "recipe", "splits", "preparation")}


@dataclass
class State:
    """A checkpoint: everything that a run needs to go on as if it had never stopped.

    Random numbers are a function of the position, so no generator has to be saved.
    """

    path: Path
    tensors: dict[str, Tensor]
    about: Description

    @property
    def position(self) -> Position:
        return self.about.position

    @classmethod
    def read(cls, path: Path) -> State:
        """A checkpoint of this format.

        Raises:
            CheckpointError: it is missing, damaged, or something else.
        """
        tensors, about = read_bundle(path)
        kind = about.get("kind")
        if kind != "state":
            raise CheckpointError(f"{str(path)!r} holds a {shown(kind)}, not the state of a run")
        try:
            return cls(path, tensors, typed(Description, about, error=CheckpointError))
        except CheckpointError as error:
            raise CheckpointError(
                f"{str(path)!r} is damaged, or of another version of dynnet: {error}; begin a new run in another --out"
            ) from error

    @classmethod
    def write(
        cls,
        out: Path,
        position: Position,
        model: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer | None,
        log: Log,
        here: World,
        more: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint, all or nothing.

        Args:
            out: folder of the run.
            position: where to go on.
            model, ema, optimizer: as they are there; no optimiser between two stages.
            log: of the run.
            here: the first process writes.
            more: what else the checkpoint says: what the run is, and the shape of its backbone.

        Raises:
            CheckpointError: it cannot be written; the last one is whole.
        """
        if not here.first:
            return
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        if ema is not None:
            tensors |= {f"ema.{k}": v for k, v in ema.module.state_dict().items()}
        kept = Saved(state={}, param_groups=[])
        if optimizer is not None:
            more_tensors, kept = saved(optimizer)
            tensors |= more_tensors
        about = {
            **more,
            "kind": "state",
            "position": dataclasses.asdict(position),
            "optimizer": kept,
            "log_bytes": log.bytes(),
        }
        write_bundle(out / "state.safetensors", tensors, about)

    def check(self, identity: Mapping[str, Any], stages: Sequence[StageConfig], images: int) -> None:
        """Is it of this run?

        Args:
            identity: what the run is.
            stages: of the run.
            images: in an epoch.

        Raises:
            CheckpointError: it is of another, or at a place that the run does not have.
        """
        check_same(self.about.identity, identity, str(self.path))
        at = self.position
        stage = stages[at.stage] if 0 <= at.stage < len(stages) else StageConfig(epochs=0)
        within = 0 <= at.epoch < stage.epochs and 0 <= at.step < images // stage.batch_size
        between = at.epoch in (0, stage.epochs) and at.step == 0
        if not 0 <= at.stage <= len(stages) or not (within or between):
            raise self._damage(f"there is no {at} in the run")
        if self.about.log_bytes < 0:
            raise self._damage(f"log_bytes is {self.about.log_bytes}")
        if at.inside != bool(self.about.optimizer["param_groups"]):
            raise self._damage(f"{at} {'needs an' if at.inside else 'has no'} optimiser")

    def shape_(self, backbone: nn.Module, create: Mapping[str, Any]) -> None:
        """Make a fresh backbone as narrow and as short as the saved one, in place.

        Args:
            backbone: as timm makes it.
            create: what `timm.create_model` was called with.

        Raises:
            CheckpointError: it cannot be made so.
        """
        with self.told():
            bring_into_shape_(backbone, self.about.shape)
            if pruned_shape(backbone, create) != self.about.shape:
                raise self._damage("no model has this shape")

    def restore(self, model: nn.Module, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Load what was saved, in place.

        Raises:
            CheckpointError: it is of another model or optimiser.
        """
        load_weights_(model, self._part("model."), self.path)
        if not self.position.inside:
            return
        if ema is not None:
            load_weights_(ema.module, self._part("ema."), self.path)
        if optimizer is not None:
            with self.told():
                self._restore_optimizer(optimizer)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        fresh, kept = optimizer.state_dict()["param_groups"], self.about.optimizer
        if [group["params"] for group in fresh] != [group.get("params") for group in kept["param_groups"]]:
            raise self._damage("its optimiser has other groups of parameters")
        for group, entries in zip(fresh, kept["param_groups"], strict=True):
            for key, value in group.items():
                if key not in entries or not _alike(value, entries[key]):
                    raise self._damage(f"its optimiser has {key}={shown(entries.get(key))}, a new one {shown(value)}")
        state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in kept["state"].items()}
        for name, tensor in self._part("optimizer.").items():
            i, key = name.split(".", 1)
            state[int(i)][key] = tensor
        if not state.keys() <= {i for group in fresh for i in group["params"]}:
            raise self._damage("its optimiser has other parameters")
        optimizer.load_state_dict({"state": state, "param_groups": kept["param_groups"]})

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def _damage(self, told: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r} is damaged: {told}; begin a new run in another --out")

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever a description makes fail that nobody wrote in this form."""
        try:
            yield
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise self._damage(f"{type(error).__name__}: {error}") from error


def saved(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Saved]:
    """What a checkpoint holds of an optimiser: tensors, and the rest as JSON."""
    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    kept = Saved(state={}, param_groups=full["param_groups"])
    for i, entries in full["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
        kept["state"][str(i)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
    return tensors, kept


def _alike(fresh: Any, saved: Any) -> bool:
    """Is a setting of a saved optimiser of the kind that a new one has?"""
    if isinstance(fresh, list | tuple):
        return isinstance(saved, list) and len(saved) == len(fresh) and all(map(_alike, fresh, saved))
    if isinstance(fresh, int | float) and not isinstance(fresh, bool):
        number = isinstance(saved, int | float) and not isinstance(saved, bool)
        return number and (math.isfinite(saved) or saved == fresh)
    return type(saved) is type(fresh)
