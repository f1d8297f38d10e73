"""Where images come from: what timm, torchvision and scikit-learn hold, as labelled pixels.

Small images are decoded once into memory; others each time they are needed. An image that cannot be read is an error
that names it, never a silent substitute.

    N images, C channels, H x W pixels, K classes
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from torch import Tensor
from tqdm import tqdm

from dynnet.errors import DataError, did_you_mean

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


class StreamSource:
    """Images that are decoded each time they are needed.

    Args:
        dataset: what timm's `create_dataset` returned.
        rows: (N,) int64, the images of `dataset` that belong here.
        labels: (N,) int64, theirs.
        mode: Pillow's, "RGB" or "L".
    """

    def __init__(self, dataset: Any, rows: Tensor, labels: Tensor, mode: str) -> None:
        self.dataset, self.rows, self.labels, self.mode = dataset, rows, labels, mode

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return _name(self.dataset, int(self.rows[index]))

    def image(self, index: int) -> Image.Image:
        return _decode(self.dataset, int(self.rows[index]), self.mode)

    def pixels(self, index: int) -> np.ndarray:
        image = np.asarray(self.image(index))
        self.close()
        return image[:, :, None] if image.ndim == 2 else image

    def close(self) -> None:
        """Close what decoding has opened; it is opened again when needed."""
        _close(self.dataset)

    def subset(self, rows: Tensor) -> StreamSource:
        return StreamSource(self.dataset, self.rows[rows], self.labels[rows], self.mode)


Source = MemorySource | StreamSource


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


def open_source(
    name: str, root: str, split: str, input_size: tuple[int, int, int] | None = None, download: bool = False
) -> tuple[Source, tuple[str, ...]]:
    """One split of a dataset, and the names of its K classes.

    Args:
        name: for timm's `create_dataset`; "" for a folder that holds the split as a folder or a tar.
        root: folder of the dataset.
        split: its name.
        input_size: (C, H, W) wanted; images of another size are streamed, to be resized by the loader.
        download: let torchvision or Hugging Face fetch it.

    Raises:
        DataError: the dataset is missing or empty, or an image to be held in memory cannot be read.
    """
    channels = input_size[0] if input_size else 3
    mode = "L" if channels == 1 else "RGB"
    dataset = _open(name, root, split, mode, download)
    labels = _labels(dataset)
    classes = _classes(dataset, labels)
    first = _decode(dataset, 0, mode)
    if max(first.size) > _SMALL_SIDE or (input_size and input_size[1:] != (first.height, first.width)):
        _close(dataset)
        return StreamSource(dataset, torch.arange(len(dataset)), labels, mode), classes
    images = _decode_all(dataset, mode, (channels, first.height, first.width), f"decoding {split}")
    return MemorySource(images, labels, [_name(dataset, i) for i in range(len(dataset))]), classes


def _open(name: str, root: str, split: str, mode: str, download: bool) -> Any:
    """timm's dataset, with at least one image."""
    folder = Path(root)
    if root and not folder.is_dir() and not download:
        raise DataError(f"no data folder {root!r}; give an existing one with --data, or allow data.download")
    where = root if name else str(_split_folder(folder, split))
    try:
        dataset = create_dataset(
            name, root=where, split=split, download=download, input_img_mode=mode, search_split=bool(name)
        )
        count = len(dataset)
    except (OSError, RuntimeError, AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"timm cannot open dataset {name or 'folder'!r} at {where!r}, split {split!r}: {error}"
        ) from error
    if count == 0:
        raise DataError(f"dataset {name or where!r}, split {split!r}, holds no images")
    return dataset


def _decode_all(dataset: Any, mode: str, shape: tuple[int, int, int], told: str) -> Tensor:
    """(N, C, H, W) uint8 images, which all have this shape, (C, H, W)."""
    images = np.empty((len(dataset), *shape), np.uint8)
    for i in tqdm(range(len(dataset)), desc=told, leave=False, disable=None):
        pixels = np.asarray(_decode(dataset, i, mode))
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if pixels.shape != shape:
            raise DataError(
                f"image {_name(dataset, i)!r} is {pixels.shape[2]}x{pixels.shape[1]}, the first of the split is "
                f"{shape[2]}x{shape[1]}; set data.input_size to have all resized"
            )
        images[i] = pixels
    _close(dataset)
    return torch.from_numpy(images)


def _split_folder(root: Path, split: str) -> Path:
    """`root/split`, `root/split.tar`, or a usual synonym of the split."""
    synonyms = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid", "eval")}
    for name in (split, *synonyms.get(split, ())):
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    found = sorted(p.name for p in root.iterdir())[:8]
    raise DataError(
        f"{str(root)!r} has no {split!r} folder or {split}.tar; it holds {found}{did_you_mean(split, found)}"
    )


def _classes(dataset: Any, labels: Tensor) -> tuple[str, ...]:
    """K names, in the order of the labels; the labels themselves where the dataset has no names."""
    reader = getattr(dataset, "reader", None)
    for owner, attribute in ((dataset, "class_to_idx"), (reader, "class_to_idx"), (reader, "class_name_to_idx")):
        if to_index := getattr(owner, attribute, None):
            return tuple(str(name) for name in sorted(to_index, key=to_index.__getitem__))
    return tuple(str(i) for i in range(int(labels.max()) + 1))


def _labels(dataset: Any) -> Tensor:
    """(N,) int64, without decoding an image where the dataset allows it."""
    reader: Any = getattr(dataset, "reader", None)
    for owner in (dataset, reader):
        if getattr(owner, "targets", None) is not None:
            return torch.as_tensor(np.asarray(owner.targets)).long()
    if hasattr(reader, "samples"):
        return torch.tensor([int(sample[1]) for sample in reader.samples])
    if hasattr(reader, "label_key"):  # Hugging Face: a column
        return torch.as_tensor(np.asarray(reader.dataset[reader.label_key])).long()
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def _decode(dataset: Any, index: int, mode: str) -> Image.Image:
    try:
        # timm's own __getitem__ answers for an unreadable image with the next one, so its reader is asked directly.
        found = (dataset.reader if hasattr(dataset, "reader") else dataset)[index][0]
        if isinstance(found, Image.Image):
            return found.convert(mode)
        with (
            contextlib.closing(found) if hasattr(found, "close") else contextlib.nullcontext(),
            Image.open(found) as image,
        ):
            return image.convert(mode)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read image {_name(dataset, index)!r}: {error}; replace or remove it") from error


def _close(dataset: Any) -> None:
    """Close the tar files that timm's reader has opened; it opens them again when they are needed.

    Left open, they would be shared with decoding processes, whose reads would move each other's place in the file.
    """
    states = [getattr(getattr(dataset, "reader", None), "tar_state", None)]
    while states:
        state = states.pop()
        if state is not None:
            if state.tf is not None:
                state.tf.close()
                state.tf = None
            states += state.children.values()


def _name(dataset: Any, index: int) -> str:
    if hasattr(dataset, "filename"):
        with contextlib.suppress(Exception):
            return str(dataset.filename(index))
    return f"image {index}"
