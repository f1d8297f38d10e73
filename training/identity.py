"""What a run is: its program, its recipe and its images. It goes on as what it was begun as, or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from dynnet.errors import CheckpointError
from dynnet.learning.data import Data
from dynnet.learning.recipes import Recipe, plain_recipe
from dynnet.learning.sources import Source
from dynnet.schema import flat, shown

# What decides nothing about the numbers of a run, and may change on the way. Neither does the number of processes,
# nor where the images are, as long as their names, labels and splits are the same.
FREE = (
    "description",
    "log_steps",
    "checkpoint_steps",
    "data.root",
    "data.label",
    "data.workers",
    "data.download",
)

_NAMED = 50_000  # names of a split that are looked at: some datasets read an image to tell its name
_TOLD = 8  # differences in a message


def identity_of(program: str, recipe: Recipe, data: Data) -> dict[str, Any]:
    """What a run is, as JSON; its checkpoints say so.

    Returns:
        "program", "recipe": all its values, "splits": of each the number of images, and digests of their labels and
        names, in their order, and "preparation": of images, with a digest of the classes' names.
    """
    preparation = {**data.preparation, "label_names": _digest(*data.classes)}
    splits = {name: _split(getattr(data, name)) for name in ("train", "calibration", "test")}
    found = {"program": program, "recipe": plain_recipe(recipe), "splits": splits, "preparation": preparation}
    return cast(dict[str, Any], json.loads(json.dumps(found)))  # as a checkpoint will say it


def check_same(was: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    """Refuse to go on as another run.

    Args:
        was: what a checkpoint says of its run.
        now: the identity of the run that is to go on.
        path: of the checkpoint.

    Raises:
        CheckpointError: they differ in more than is free to change; with keys, old and new values.
    """
    before, after = dict(flat(was)), dict(flat(now))
    free = {f"recipe.{key}" for key in FREE}
    told = [
        f"{key.removeprefix('recipe.')} was {_value(before, key)}, is {_value(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if key not in free and (key not in before or key not in after or before[key] != after[key])
    ]
    if told:
        more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        raise CheckpointError(
            f"{path!r} is of another run: {'; '.join(told[:_TOLD])}{more}. Put back what it was begun with "
            f"(recipe.yaml in its folder, the images) and go on, or begin a new run in another --out"
        )


def _value(values: Mapping[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "not there"


def _split(source: Source) -> dict[str, Any]:
    step = -(-len(source) // _NAMED) or 1
    return {
        "images": len(source),
        "labels": hashlib.sha256(source.labels.numpy().tobytes()).hexdigest()[:16],
        "names": _digest(*(source.name(i) for i in range(0, len(source), step))),
    }


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]
