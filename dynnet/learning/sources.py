"""Where images come from: what lies on disk, and what timm, torchvision and scikit-learn hold, as labelled pixels.

Small images of one size are decoded once into memory, also where a model sees them enlarged; others each time they are
needed: all splits of a dataset in the same way. An image that cannot be read is an error that names it, never a silent
substitute.

    N images, C channels, H x W pixels, K classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dynnet.errors import DataError
from dynnet.learning.folders import Listing, check_apart, is_undivided, list_place, list_split, split_place
from dynnet.learning.hosted import Hosted
from dynnet.learning.origins import FOLDER, TORCH_FOLDERS
from dynnet.learning.pictures import decode

# Above this many pixels a side, images are decoded anew for every epoch instead of once into memory.
_SMALL_SIDE = 64


@dataclass(frozen=True)
class MemorySource:
    """Small images, decoded once.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        names: one a picture, for messages and tables.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]

    def pixels(self, index: int) -> np.ndarray:
        return self.images[index].permute(1, 2, 0).numpy()

    def subset(self, rows: Tensor) -> MemorySource:
        return MemorySource(self.images[rows], self.labels[rows], [self.names[i] for i in rows.tolist()])


class Images(Protocol):
    """The N images of a split.

    Attributes:
        labels: (N,) int64.
    """

    labels: Tensor

    def name(self, index: int) -> str: ...

    def image(self, index: int, mode: str) -> Image.Image: ...


class StreamSource:
    """Images that are decoded each time they are needed.

    Args:
        images: where they come from.
        rows: (N,) int64, those of them that belong here.
        mode: Pillow's, "RGB" or "L".
    """

    def __init__(self, images: Images, rows: Tensor, mode: str) -> None:
        self.images, self.rows, self.mode = images, rows, mode
        self.labels = images.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.images.name(int(self.rows[index]))

    def image(self, index: int) -> Image.Image:
        return self.images.image(int(self.rows[index]), self.mode)

    def pixels(self, index: int) -> np.ndarray:
        image = np.asarray(self.image(index))
        return image[:, :, None] if image.ndim == 2 else image

    def subset(self, rows: Tensor) -> StreamSource:
        return StreamSource(self.images, self.rows[rows], self.mode)


Source = MemorySource | StreamSource


class OnDisk:
    """The images of a split that lie in files of their own or in a tar.

    Args:
        listing: what is there.
        classes: K names, in the order of the labels.
    """

    def __init__(self, listing: Listing, classes: tuple[str, ...]) -> None:
        number = {name: label for label, name in enumerate(classes)}
        self.labels = torch.tensor([number[name] for name in listing.labels])
        self._stored, self._names = listing.stored, listing.names

    def name(self, index: int) -> str:
        return self._names[index]

    def image(self, index: int, mode: str) -> Image.Image:
        return decode(self._stored[index], self._names[index], mode)


def digits() -> tuple[MemorySource, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn; install it with `pip install scikit-learn`") from None
    digits = load_digits()
    # Sixteen grey levels, 0..16, stretched to 0..255.
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    names = [f"digit {i}" for i in range(len(images))]
    return MemorySource(images, torch.from_numpy(digits.target).long(), names), tuple("0123456789")


def open_splits(
    name: str, root: str, splits: tuple[str, str], input_size: tuple[int, int, int] | None, download: bool
) -> tuple[Source, Source | None, tuple[str, ...]]:
    """What to learn from, what to test on, and the names of the K classes; None for a folder that has no splits.

    Args:
        name: of the dataset, as `DataConfig` has it.
        root: its folder.
        splits: the names of both.
        input_size: (C, H, W) wanted.
        download: let torchvision or Hugging Face fetch it.

    Raises:
        DataError: the dataset is missing or empty, its splits disagree, or an image to be held in memory cannot be
            read or has another size.
    """
    images, classes = _open_images(name, root, splits, download)
    channels = input_size[0] if input_size else 3
    mode = "L" if channels == 1 else "RGB"
    first = images[0].image(0, mode)
    if max(first.size) <= _SMALL_SIDE and (input_size is None or enlarges((first.height, first.width), input_size[1:])):
        try:
            shape = (channels, first.height, first.width)
            held = [_hold(source, mode, shape, split) for source, split in zip(images, splits, strict=False)]
            return held[0], (held[1] if len(held) > 1 else None), classes
        except _SizeError as error:
            if input_size is None:
                raise DataError(f"{error}; set data.input_size to have all resized") from None
    streams = [StreamSource(source, torch.arange(len(source.labels)), mode) for source in images]
    return streams[0], (streams[1] if len(streams) > 1 else None), classes


def origin(name: str, root: str, splits: tuple[str, str]) -> str:
    """Where `open_splits` takes images from, in words."""
    if name not in (FOLDER, *TORCH_FOLDERS):
        return name
    if is_undivided(Path(root), splits):
        return (
            f"{root}, which has no folders {splits[0]!r} and {splits[1]!r}: some of its images are held out for testing"
        )
    train, test = (split_place(Path(root), split) for split in splits)
    return f"{train} to learn from, {test} to test on"


def _open_images(name: str, root: str, splits: tuple[str, str], download: bool) -> tuple[list[Images], tuple[str, ...]]:
    """The images of both splits, whose labels mean the same, or all that are there; the names of the K classes."""
    if name not in (FOLDER, *TORCH_FOLDERS):
        train, test = (Hosted.open(name, root, split, download) for split in splits)
        _check_classes(root or name, splits, train.classes, test.classes)
        if train.classes != test.classes:
            raise DataError(
                f"the splits {splits[0]!r} and {splits[1]!r} of {name!r} number the same classes in another order; "
                "give two of one order"
            )
        return [train, test], train.classes
    if is_undivided(Path(root), splits):
        listing = list_place(Path(root), by_first=name in TORCH_FOLDERS)
        if listing.barren:
            raise DataError(
                f"{root!r} has folders without images: {', '.join(sorted(listing.barren))}; every folder is a class, "
                f"so put images there, or remove them"
            )
        return [OnDisk(listing, listing.classes)], listing.classes
    check_apart(Path(root), splits)
    listings = [list_split(Path(root), split, by_first=name in TORCH_FOLDERS) for split in splits]
    classes = listings[0].classes
    # A folder without images is a class if there are images of it to learn from: then all keep their numbers.
    present = (*listings[1].classes, *(set(classes) & listings[1].barren))
    _check_classes(root, splits, classes, present)
    return [OnDisk(listing, classes) for listing in listings], classes


def enlarges(size: Sequence[int], wanted: Sequence[int]) -> bool:
    """Is a size (H, W) another one, or the same, made larger by one factor?"""
    return wanted[0] >= size[0] and wanted[0] * size[1] == wanted[1] * size[0]


class _SizeError(Exception):
    """Images of several sizes, which cannot be held in memory as they are."""


def _hold(images: Images, mode: str, shape: tuple[int, int, int], split: str) -> MemorySource:
    """All images decoded, which must have this shape, (C, H, W)."""
    count = len(images.labels)
    pixels = np.empty((count, *shape), np.uint8)
    for i in tqdm(range(count), desc=f"decoding {split}", leave=False, disable=None):
        image = images.image(i, mode)
        if image.size != (shape[2], shape[1]):
            raise _SizeError(
                f"image {images.name(i)!r} of {split!r} is {image.width}x{image.height}, the first to learn from is "
                f"{shape[2]}x{shape[1]}"
            )
        array = np.asarray(image)
        pixels[i] = array if mode == "L" else array.transpose(2, 0, 1)
    return MemorySource(torch.from_numpy(pixels), images.labels, [images.name(i) for i in range(count)])


def _check_classes(where: str, splits: tuple[str, str], train: Sequence[str], test: Sequence[str]) -> None:
    """Refuse splits whose labels would not mean the same."""
    only = [sorted(set(train) - set(test)), sorted(set(test) - set(train))]
    if not any(only):
        return
    told = ", ".join(f"only {split!r} has {names[:5]}" for split, names in zip(splits, only, strict=True) if names)
    raise DataError(
        f"the splits {splits[0]!r} and {splits[1]!r} of {where!r} disagree on the classes: {len(train)} against "
        f"{len(test)}, {told}; give both the same class folders, which may be empty in {splits[1]!r}"
    )
