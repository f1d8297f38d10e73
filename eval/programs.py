"""What the evaluation programs have in common: how they end, and the figures that they write."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from torch import nn

from dynnet.errors import DynnetError, InputError
from dynnet.files.bundles import write_atomically
from dynnet.files.creation import unknown_to_timm


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """An error that dynnet raises on purpose ends the program with its message, without a traceback, and so does a disk
    that is full, or a folder that may not be written to."""
    try:
        yield
    except (DynnetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def timm_model(name: str) -> nn.Module:
    """A model of timm's with random weights, as a classifier of 1000 classes, in eval mode.

    Raises:
        InputError: timm has no model of this name.
    """
    if told := unknown_to_timm(name):
        raise InputError(told)
    return timm.create_model(name, num_classes=1000).eval()


def write_json(found: Any, path: Path) -> None:
    """Figures as a JSON file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
