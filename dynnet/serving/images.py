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
    """An image as timm would evaluate it: the short side resized, the middle cut out, normalised.

    Args:
        image: the path of a file, or what is in it.
        input_size: (C, H, W).
        preparation: "mean", "std", "crop_pct" and "interpolation", as far as the model says.

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
    crop = float(preparation.get("crop_pct") or 1.0)
    # As torchvision's Resize and CenterCrop round, for images as high as wide.
    wanted = math.floor(width / crop), math.floor(height / crop)
    scale = max(wanted[0] / picture.width, wanted[1] / picture.height)
    size = max(wanted[0], int(picture.width * scale)), max(wanted[1], int(picture.height * scale))
    if size != picture.size:
        chosen = _FILTERS.get(str(preparation.get("interpolation")), Image.Resampling.BICUBIC)
        picture = picture.resize(size, chosen)
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    mean, std = (
        np.asarray(preparation.get(key) or (default,) * channels, np.float32).reshape(-1, 1, 1)
        for key, default in (("mean", 0.0), ("std", 1.0))
    )
    if not len(mean) == len(std) == channels:
        raise DataError(
            f"images of {channels} channels, but the model's mean and std have {len(mean)} and {len(std)} values; set "
            f"them in its pretrained_cfg"
        )
    return np.ascontiguousarray((pixels - mean) / std)
