"""Put trained models in a row, and fit all of their thresholds together.

    python -m training.cascade --recipe models/cifar10-cascade/recipe.yaml --data path/to/cifar10 --out runs/row
    python -m training.cascade --recipe ... --cascade.members [runs/thin, runs/large] --calibration.latency 0.3 ...

Members are named by the recipe: models of the zoo, or folders of runs, the cheapest first. Nothing is trained. They
must have been trained on the recipe's data, with the same images held out. The folder of the run holds recipe.yaml
(resolved), model.safetensors with fitted thresholds, and backbone.safetensors, the dense model that the cascade is
compared with: what the last member's run left of its dense stage, or else the last member's own backbone. `eval.report`
shows it.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dynnet import DynamicModel, calibrate, cascade
from dynnet.backbone.host import preparation_of
from dynnet.errors import CheckpointError, RecipeError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.threads import fit_threads
from dynnet.files.bundles import read_bundle, write_atomically
from dynnet.files.checkpoints import load, save
from dynnet.learning.data import Data
from dynnet.learning.processes import World
from dynnet.learning.recipes import Recipe, read_recipe, recipe_to_yaml
from training.log import Log
from training.program import folder_of, open_data, run_program

_SPLITTING = ("train_split", "test_split", "calibration", "test", "seed")  # what decides which images are held out


def main(argv: Sequence[str] | None = None) -> int:
    return run_program("training.cascade", __doc__, put_in_a_row, argv)


def put_in_a_row(recipe: Recipe, out: Path, resume: bool, here: World) -> DynamicModel:
    """Build a recipe's cascade and calibrate it.

    Raises:
        RecipeError: no members, or one that was trained on other data.
        CheckpointError: a member that is not there.
    """
    if resume:
        raise CheckpointError("nothing is trained here, so that there is nothing to resume; leave out --resume")
    keep_freed_memory()
    members = [folder_of(name) for name in recipe.cascade.members]
    if len(members) < 2:
        raise RecipeError(f"cascade.members has {len(members)} entries; give two or more models, the cheapest first")
    recipes = [read_recipe(path / "recipe.yaml") for path in members]
    for path, other in zip(members, recipes, strict=True):
        _check_data(recipe, other, path)
    recipe = dataclasses.replace(recipe, backbone=recipes[-1].backbone)
    data, _ = open_data(recipe, here)
    config = recipe.cascade
    model = cascade(
        [load(path / "model.safetensors") for path in members],
        combine=config.combine,
        input_sizes=config.input_sizes or None,
        confidence=config.confidence,
    )
    _check_images(model, data)
    print(f"{' then '.join(config.members)} on {data.label}: exits {', '.join(model.exits)}", flush=True)
    print(f"calibration: {fit_threads(model, model.input_size, 256)}", flush=True)
    fitted = calibrate(model, data.loader("calibration", 256), **recipe.calibration.goal())
    print(fitted, flush=True)
    write_atomically(out / "recipe.yaml", recipe_to_yaml(recipe).encode())
    with Log(out, 0, here) as log:
        log.write({"kind": "calibration", **dataclasses.asdict(fitted)})
    dense = members[-1] / "backbone.safetensors"
    if dense.is_file():
        shutil.copyfile(dense, out / "backbone.safetensors")
    else:
        save(_bare(members[-1]), out / "backbone.safetensors", _create(members[-1]))
    save(model, out / "model.safetensors", [_create(path) for path in members])
    return model


def _check_data(recipe: Recipe, other: Recipe, path: Path) -> None:
    """
    Raises:
        RecipeError: other images, or others held out: thresholds would be fitted on what a member was trained on.
    """
    mine, theirs = ({key: getattr(one.data, key) for key in _SPLITTING} for one in (recipe, other))
    if different := [key for key in _SPLITTING if mine[key] != theirs[key]]:
        told = ", ".join(f"data.{key} {theirs[key]!r} and here {mine[key]!r}" for key in different)
        raise RecipeError(f"{str(path)!r} was trained with {told}; members and cascade must hold out the same images")


def _check_images(model: DynamicModel, data: Data) -> None:
    """
    Raises:
        RecipeError: the data come in another size, or prepared otherwise, than the cascade takes them.
    """
    wanted = {"input_size": model.input_size, **preparation_of(model)}
    given = {"input_size": data.input_size, **data.preparation}
    for key in ("input_size", "mean", "std"):
        if key in wanted and key in given and tuple(wanted[key]) != tuple(given[key]):
            raise RecipeError(f"data.{key}={list(given[key])}: the cascade takes {list(wanted[key])}; set that")


def _bare(path: Path) -> nn.Module:
    model = load(path / "model.safetensors")
    return model.unwrap() if isinstance(model, DynamicModel) else model


def _create(path: Path) -> dict[str, Any]:
    """What makes a member's architecture."""
    return dict(read_bundle(path / "model.safetensors")[1]["create"])


if __name__ == "__main__":
    sys.exit(main())
