"""Images in files or in requests, prepared as a model takes them; numpy and Pillow, no torch.

C channels, H x W pixels
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynnet.errors import DataError
from dynnet.learning.pictures import Stored, decode, is_picture

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def pictures_in(folder: Path) -> list[Path]:
    """The image files of a folder, to the bottom, in order.

    Raises:
        DataError: there are none.
    """
    found = sorted((path for path in folder.rglob("*") if is_picture(path.name)), key=str)
    if not found:
        raise DataError(f"no images in {str(folder)!r}; name a folder of some")
    return found


def prepared(image: Path | bytes, input_size: Sequence[int], preparation: Mapping[str, Any]) -> np.ndarray:
    """An image as timm would evaluate it: resized, the middle cut out, normalised. By its "crop_mode" the short side
    decides what is cut off ("center"), both sides are resized apart ("squash"), or the whole picture gets borders of
    the mean ("border").

    Args:
        image: the path of a file, or what is in it.
        input_size: (C, H, W).
        preparation: "mean", "std", "crop_pct", "crop_mode" and "interpolation", as far as the model says.

    Returns:
        (C, H, W) float32.

    Raises:
        DataError: the file is missing or no image, or the preparation is that of other channels.
    """
    if isinstance(image, Path) and not image.is_file():
        raise DataError(f"no image file {str(image)!r}")
    channels, height, width = input_size
    stored, name = (Stored(str(image)), str(image)) if isinstance(image, Path) else (image, "of the request")
    picture = decode(stored, name, "L" if channels == 1 else "RGB")
    mean, std = (
        np.asarray(preparation.get(key) or (default,) * channels, np.float32).reshape(-1, 1, 1)
        for key, default in (("mean", 0.0), ("std", 1.0))
    )
    if not len(mean) == len(std) == channels:
        raise DataError(
            f"images of {channels} channels, but the model's mean and std have {len(mean)} and {len(std)} values; set "
            f"them in its pretrained_cfg"
        )
    crop = float(preparation.get("crop_pct") or 1.0)
    size = _size(picture.size, (math.floor(width / crop), math.floor(height / crop)), preparation.get("crop_mode"))
    if size != picture.size:
        chosen = _FILTERS.get(str(preparation.get("interpolation")), Image.Resampling.BICUBIC)
        picture = picture.resize(size, chosen)
    pixels = np.asarray(_middle(picture, (width, height), mean.ravel()), np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray((pixels - mean) / std)


def _size(given: tuple[int, int], wanted: tuple[int, int], mode: str | None) -> tuple[int, int]:
    """(W, H) to which a picture is resized, rounded as torchvision and timm do."""
    if mode == "squash":
        return wanted
    if mode == "border":
        ratio = max(given[0] / wanted[0], given[1] / wanted[1])
        return round(given[0] / ratio), round(given[1] / ratio)
    scale = max(wanted[0] / given[0], wanted[1] / given[1])
    return max(wanted[0], int(given[0] * scale)), max(wanted[1], int(given[1] * scale))


def _middle(picture: Image.Image, wanted: tuple[int, int], mean: np.ndarray) -> Image.Image:
    """The middle of a picture, (W, H) of it, with borders of the mean where it is smaller."""
    whole = max(picture.width, wanted[0]), max(picture.height, wanted[1])
    if whole != picture.size:
        colour = [round(255 * float(value)) for value in mean]
        wider = Image.new(picture.mode, whole, colour[0] if len(colour) == 1 else tuple(colour))
        wider.paste(picture, ((whole[0] - picture.width) // 2, (whole[1] - picture.height) // 2))
        picture = wider
    left, top = (round((has - want) / 2) for has, want in zip(picture.size, wanted, strict=True))
    return picture.crop((left, top, left + wanted[0], top + wanted[1]))
