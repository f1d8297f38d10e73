"""Datasets that timm opens for us: torchvision's, and Hugging Face's. N images, K classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor

from dynnet.errors import DataError
from dynnet.learning.origins import HUGGING_FACE
from dynnet.learning.pictures import Stored, decode, printable


class Hosted:
    """One split of a dataset that timm opened.

    Args:
        dataset: what timm's `create_dataset` returned.
        told: its name and split, for messages.

    Attributes:
        labels: (N,) int64, below K.
        classes: K names, in the order of the labels.

    Raises:
        DataError: no images, or labels that are no numbers of classes.
    """

    def __init__(self, dataset: Any, told: str) -> None:
        self.dataset, self.told = dataset, told
        try:
            self._paths = _paths(dataset)
            self.labels = _labels(dataset)
        except Exception as error:  # labels of any type, and images that are decoded for them
            raise DataError(
                f"cannot read the labels of {told}: {str(error) or repr(error)}; one class an image is needed"
            ) from error
        if len(self.labels) == 0:
            raise DataError(f"{told} holds no images")
        self.classes = _classes(dataset, int(self.labels.max()) + 1)
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"{told} has labels from {low} to {high} for {len(self.classes)} classes; choose a split with labels"
            )

    @classmethod
    def open(cls, name: str, root: str, split: str, download: bool) -> Hosted:
        """By a name that `origins.check_name` lets pass.

        Raises:
            DataError: it is missing, empty, damaged or has no labels.
        """
        told = f"dataset {name!r}, split {split!r}"
        repository = name.removeprefix(HUGGING_FACE)
        if repository != name and Path(repository).exists():
            raise DataError(f"{told} would be read from the folder {repository!r} here; run elsewhere, or rename that")
        if root and not download and not Path(root).is_dir():
            raise DataError(f"no data folder {root!r}; give an existing one with --data, or allow data.download")
        try:
            dataset = create_dataset(name, root=root or None, split=split, download=download, search_split=True)
        except Exception as error:  # damaged files, missing packages and servers raise anything
            raise DataError(
                f"timm cannot open {told} at {root!r}: {str(error) or repr(error)}; mend or fetch it"
            ) from error
        return cls(dataset, told)

    def name(self, index: int) -> str:
        try:
            stored = self._stored(index)
        except Exception:  # what cannot be read has a number still
            return f"image {index}"
        return printable(stored.path) if isinstance(stored, Stored) else f"image {index}"

    def image(self, index: int, mode: str) -> Image.Image:
        try:
            stored = self._stored(index)
        except Exception as error:  # what is damaged makes anything be raised
            raise DataError(
                f"cannot read image {index} of {self.told}: {str(error) or repr(error)}; mend or fetch it"
            ) from error
        return decode(stored, self.name(index), mode)

    def _stored(self, index: int) -> Stored | bytes | Image.Image:
        """An image, before it is decoded where that is left to us."""
        if (reader := getattr(self.dataset, "reader", None)) is not None:  # of Hugging Face
            row = reader.dataset[index][reader.image_key]
            return row["bytes"] or Stored(row["path"])
        if self._paths:
            return Stored(self._paths[index])
        return self.dataset[index][0]


def _paths(dataset: Any) -> list[str]:
    """Where the images of torchvision's datasets are that keep each in a file; none for others."""
    if (index := getattr(dataset, "index", None)) is not None:  # iNaturalist's, in the order of the file system
        index.sort()
        return [str(Path(dataset.root, dataset.all_categories[label], name)) for label, name in index]
    return [str(path) for path, _ in getattr(dataset, "imgs", ())]


def _labels(dataset: Any) -> Tensor:
    """(N,) int64, without decoding an image where the dataset allows it."""
    if (reader := getattr(dataset, "reader", None)) is not None:
        labels = reader.dataset[reader.label_key]
    elif getattr(dataset, "targets", None) is not None:
        labels = dataset.targets
    elif getattr(dataset, "target_type", None) == ["full"]:  # iNaturalist's species
        labels = [label for label, _ in dataset.index]
    else:
        labels = [int(dataset[i][1]) for i in range(len(dataset))]
    array = np.asarray(labels)
    if array.size and not (array.ndim == 1 and np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"they are {array.dtype} of {array.ndim} dimensions")
    return torch.as_tensor(array).long()


def _classes(dataset: Any, count: int) -> tuple[str, ...]:
    """K names, in the order of the labels; the labels themselves where the dataset has no names."""
    for owner in (dataset, getattr(dataset, "reader", None)):
        if to_index := getattr(owner, "class_to_idx", None):
            names: dict[int, str] = {}  # the first of several of a class, as ImageNet has them
            for name, label in to_index.items():
                names.setdefault(label, str(name))
            return tuple(names[label] for label in sorted(names))
    return tuple(str(label) for label in range(count))
