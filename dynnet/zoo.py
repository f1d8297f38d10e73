"""Trained dynamic models by name. One folder a model: recipe.yaml, README.md, results.json, model.safetensors."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any, cast

from dynnet.errors import CheckpointError, did_you_mean
from dynnet.files import checkpoints
from dynnet.model import DynamicModel
from dynnet.schema import parse

_WEIGHTS = "model.safetensors"
_RENAMED = {"load": "dynnet.create_model(name)", "names": "dynnet.list_models()"}


def list_models(filter: str = "*") -> list[str]:
    """Names of the zoo's models, as `timm.list_models` gives those of timm.

    >>> list_models("*resnet20*")
    ['cifar10-resnet20', 'cifar10-resnet20-gated', 'cifar10-resnet20-pruned']

    Args:
        filter: with * for any letters.
    """
    return sorted(name for path in folder().glob(f"*/{_WEIGHTS}") if fnmatch.fnmatch(name := path.parent.name, filter))


def create_model(name: str) -> DynamicModel:
    """A trained model of the zoo, in eval mode, with its fitted thresholds.

    >>> model = create_model("digits")
    >>> model.num_classes, model.input_size
    (10, (1, 8, 8))

    Raises:
        CheckpointError: no model of this name, or its file is damaged.
    """
    return cast(DynamicModel, checkpoints.load(_folder_of(name) / _WEIGHTS))


def results(name: str) -> dict[str, Any]:
    """What was measured of a model: its results.json.

    Raises:
        CheckpointError: no model of this name, or nothing was measured of it.
    """
    path = _folder_of(name) / "results.json"
    if not path.is_file():
        raise CheckpointError(f"no results of {name!r} in the zoo: {path.name} is missing")
    return dict(parse(path.read_text(), finite=False))


def folder() -> Path:
    """Where the zoo is: inside the installed package, or `models/` of a checkout."""
    inside = Path(__file__).parent / "_zoo"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "models"


def _folder_of(name: str) -> Path:
    if name not in list_models() and (folder() / name / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{name!r} is in the zoo without its {_WEIGHTS}: make it from its recipe.yaml in a checkout, or take it "
            f"from the hub, dynnet.load('hf-hub:OWNER/{name}'), where somebody has put it"
        )
    if name not in list_models():
        raise CheckpointError(
            f"the zoo has no model {name!r}{did_you_mean(name, list_models())}; it has {', '.join(list_models())}"
        )
    return folder() / name


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise ImportError(f"dynnet.zoo.{name} is {_RENAMED[name]} now")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
