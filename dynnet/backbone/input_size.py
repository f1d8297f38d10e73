"""The size of the images that a plain model takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from dynnet.backbone.names import title
from dynnet.errors import DynnetError, ForwardError


def input_size_of(backbone: nn.Module) -> tuple[int, int, int]:
    """The (C, H, W) that a timm model was made for: its patch embedding's, else its pretrained configuration's."""
    config: dict[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        height, width = size
    first = config.get("first_conv")
    with contextlib.suppress(AttributeError):  # a name that is no module says nothing
        found = backbone.get_submodule(first).in_channels if isinstance(first, str) else channels
        # TResNet moves 4x4 pixels into channels before its first convolution.
        channels = channels if found in (4 * channels, 16 * channels) else found
    return int(channels), int(height), int(width)


@contextlib.contextmanager
def first_run(model: nn.Module, size: tuple[int, ...], error: type[DynnetError]) -> Iterator[None]:
    """The first dry run of a model on a size that somebody gave.

    Raises:
        error: in place of a `ForwardError`, told as what it mostly is: images that the model cannot take.
    """
    try:
        yield
    except ForwardError as raised:
        remedy = "" if raised.remedy else "; give the size it was made for as input_size="
        raise error(f"{title(model)} cannot run on images of size {tuple(size)} ({raised}){remedy}") from raised
