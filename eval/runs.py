"""A finished training run, read back: its recipe, its data, its model; and models of the zoo with their data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dynnet import DynamicModel, create_model, load
from dynnet.errors import CheckpointError
from dynnet.learning.data import Data, load_data
from dynnet.learning.recipes import Recipe, read_recipe
from dynnet.zoo import folder


@dataclass(frozen=True)
class Run:
    """What `training.train` left in a folder.

    Attributes:
        path: the folder.
        recipe: as resolved.
        data: with the same splits as in training.
        model: with fitted thresholds, in eval mode.
        dense: the backbone after the dense stage, before exits were trained with it.
    """

    path: Path
    recipe: Recipe
    data: Data
    model: DynamicModel
    dense: nn.Module


def open_run(path: Path, data: str | None = None, device: str | None = None) -> Run:
    """Read a run back.

    Args:
        path: the folder.
        data: folder of the dataset, where it is not the recipe's.
        device: for the models; by default a GPU where there is one.

    Raises:
        CheckpointError: the folder holds no finished run.
    """
    for name in ("recipe.yaml", "model.safetensors", "backbone.safetensors"):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{str(path)!r} holds no finished run: {name} is missing; train one with "
                f"`python -m training.train --recipe ... --out {path}`, or finish it with --resume"
            )
    recipe = read_recipe(path / "recipe.yaml")
    if data is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=data))
    dense, model = load(path / "backbone.safetensors"), load(path / "model.safetensors")
    if not isinstance(model, DynamicModel):
        raise CheckpointError(
            f"the model of the run {str(path)!r} decides nothing by the input; show it beside one that does: --static "
            f"of eval.report takes what training.prune has made, --beside of eval.cards any run"
        )
    loaded = _data_of(recipe)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Run(path, recipe, loaded, model.to(where), dense.to(where))


def open_zoo(name: str, data: str | None = None) -> tuple[DynamicModel, Data]:
    """A model of the zoo, and the data of its recipe.

    Args:
        name: in the zoo.
        data: folder of the dataset, where it is not the recipe's.

    Raises:
        CheckpointError: no model of this name.
        DataError: no such dataset.
    """
    model = create_model(name)
    return model, _data_of(
        read_recipe(folder() / name / "recipe.yaml", [] if data is None else [f"--data.root={data}"])
    )


def _data_of(recipe: Recipe) -> Data:
    config = timm.get_pretrained_cfg(recipe.backbone.name)
    return load_data(recipe.data, config.to_dict() if config is not None else None)


def test_images(data: Data, count: int) -> tuple[Tensor, Tensor]:
    """Images of the test split as the model sees them, drawn at random: datasets are often sorted by class.

    Args:
        data: the splits.
        count: how many, or all if there are fewer.

    Returns:
        (M,) their rows in the split, rising, and (M, C, H, W) the images.
    """
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:count].sort().values
    wanted = set(rows.tolist())
    found: dict[int, Tensor] = {}
    for images, _, ids in tqdm(data.loader("test", 256), desc="images to time", leave=False, disable=None):
        found.update((i, image) for i, image in zip(ids.tolist(), images, strict=True) if i in wanted)
    return rows, torch.stack([found[i] for i in rows.tolist()])
