"""Engines that run the stages of exported models: one file each, and this table."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dynnet.errors import ExportError, did_you_mean

# By name, what `pip install` makes of it.
ENGINES = {"onnxruntime": "dynnet[deploy]", "openvino": "dynnet[openvino]", "torch": "dynnet"}


class Session(Protocol):
    """A stage, ready to run. Safe in threads."""

    def run(self, tensors: Sequence[Any]) -> list[Any]:
        """From what the stage takes to logits (b, K), confidence (b,) and what it gives, numpy arrays all."""


class Engine(Protocol):
    """What the module of an engine offers.

    Attributes:
        SUFFIX: of the files of its stages.
    """

    SUFFIX: str

    def lower(self, stage: Any, tensors: Sequence[Any], path: Path) -> None:
        """Write a `dynnet.deploy.stages.Stage` to a file; `tensors` are what it takes, of a few samples."""

    def quantize(self, path: Path, batches: Iterable[Sequence[Any]], stage: Any, first: bool) -> None:
        """Write the file of a stage anew, in int8; `batches` are what it takes, numpy arrays, images if it is the first
        stage. `stage` is that Stage."""

    def open_stage(self, path: Path, threads: int | None, stage: Any) -> Session:
        """Read a stage back, with so many threads, or one a processor. `stage` is that Stage, or its Part of a
        manifest: both say what it takes and gives."""

    def versions(self) -> Mapping[str, str]:
        """Of what it is made of."""


def named(name: str) -> str:
    """An engine and its version, for people: "onnxruntime 1.32.0"."""
    return f"{name} {engine(name).versions().get(name, '')}".strip()


def engine(name: str) -> Engine:
    """An engine by its name.

    Raises:
        ExportError: there is none of this name, or it is not installed.
    """
    if name not in ENGINES:
        raise ExportError(f"unknown engine {name!r}{did_you_mean(name, ENGINES)}; choose from {', '.join(ENGINES)}")
    try:
        found: Any = importlib.import_module(f"dynnet.deploy.engines.{name}_engine")
    except ImportError as error:
        raise ExportError(f"engine {name!r} is not installed ({error}); `pip install {ENGINES[name]}`") from error
    return found
