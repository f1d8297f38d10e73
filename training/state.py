"""What a run writes while it goes: checkpoints that it can go on from, and its log."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dynnet.errors import CheckpointError
from dynnet.files.bundles import read_bundle, write_bundle
from dynnet.files.weights import load_weights_
from dynnet.pruning.shape import Shape
from dynnet.schema import read_as
from training.distributed import World


@dataclass(frozen=True)
class Position:
    """The next step to do."""

    stage: int = 0
    epoch: int = 0
    step: int = 0


@dataclass
class State:
    """A checkpoint: everything that a run needs to go on as if it had never stopped.

    Random numbers are a function of the position, so no generator has to be saved.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def position(self) -> Position:
        return Position(**self.about["position"])

    @property
    def log_bytes(self) -> int:
        return int(self.about["log_bytes"])

    @property
    def shape(self) -> Shape:
        """Of the backbone: what pruning had made of it."""
        return read_as(Shape, self.about.get("shape", {}), "shape")

    @classmethod
    def read(cls, path: Path) -> State:
        tensors, about = read_bundle(path)
        if about.get("kind") != "state":
            raise CheckpointError(f"{str(path)!r} holds a {about.get('kind')}, not the state of a run")
        return cls(tensors, about)

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
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint, all or nothing; `more` is what else it says."""
        if not here.first:
            return
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        if ema is not None:
            tensors |= {f"ema.{k}": v for k, v in ema.module.state_dict().items()}
        kept: dict[str, Any] = {"state": {}, "param_groups": []}
        if optimizer is not None:
            full = optimizer.state_dict()
            kept["param_groups"] = full["param_groups"]
            for i, entries in full["state"].items():
                tensors |= {f"optimizer.{i}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
                kept["state"][str(i)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
        about = {
            **(more or {}),
            "kind": "state",
            "position": dataclasses.asdict(position),
            "optimizer": kept,
            "log_bytes": log.bytes(),
        }
        write_bundle(out / "state.safetensors", tensors, about)

    def restore(self, model: nn.Module, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer | None) -> None:
        load_weights_(model, self._part("model."), "state.safetensors")
        if ema is not None and self._part("ema."):
            load_weights_(ema.module, self._part("ema."), "state.safetensors")
        kept = self.about["optimizer"]
        if optimizer is not None and kept["param_groups"]:
            state = {int(i): dict(entries) for i, entries in kept["state"].items()}
            for name, tensor in self._part("optimizer.").items():
                i, key = name.split(".", 1)
                state[int(i)][key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": kept["param_groups"]})

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


class Log:
    """log.jsonl, one record a line; TensorBoard too where it is installed.

    Args:
        out: folder of the run.
        size: bytes to keep of a log that is there already; what a dead run wrote after its last checkpoint is cut off.
        here: only the first process writes.
    """

    def __init__(self, out: Path, size: int, here: World) -> None:
        self.path, self.size, self.here = out / "log.jsonl", size, here
        self.updates = 0

    def __enter__(self) -> Log:
        self.file, self.board = None, None
        if self.here.first:
            self.file = self.path.open("ab")
            self.file.truncate(self.size)
            self.updates = self.path.read_bytes().count(b"\n")
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.path.parent / "tensorboard"))
            except ImportError:
                pass
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, record: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        self.updates += 1
        if self.board is not None and "stage" in record:
            for kind in ("losses", "accuracy"):
                for i, value in enumerate(record.get(kind, [])):
                    self.board.add_scalar(f"{record['stage']}/{kind}/{i}", value, self.updates)

    def bytes(self) -> int:
        return self.file.tell() if self.file is not None else 0
