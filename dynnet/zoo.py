"""Trained dynamic models by name. One folder a model: recipe.yaml, README.md, results.json, model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynnet.errors import CheckpointError, did_you_mean
from dynnet.files.checkpoints import load as load_file
from dynnet.model import DynamicModel

_WEIGHTS = "model.safetensors"


def folder() -> Path:
    """Where the zoo is: inside the installed package, or `models/` of a checkout."""
    inside = Path(__file__).parent / "_zoo"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "models"


def names() -> list[str]:
    """Models that have weights."""
    return sorted(path.parent.name for path in folder().glob(f"*/{_WEIGHTS}"))


def load(name: str) -> DynamicModel:
    """A trained model, in eval mode, with its fitted thresholds.

    Raises:
        CheckpointError: no model of this name, or its file is damaged.
    """
    if name not in names():
        raise CheckpointError(
            f"the zoo has no model {name!r}{did_you_mean(name, names())}; it has {', '.join(names())}"
        )
    return load_file(folder() / name / _WEIGHTS)


def results(name: str) -> dict[str, Any]:
    """What was measured of a model: its results.json."""
    path = folder() / name / "results.json"
    if not path.is_file():
        raise CheckpointError(f"no results of {name!r} in the zoo; it has {', '.join(names())}")
    return dict(json.loads(path.read_text()))
