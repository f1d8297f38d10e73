"""What becomes of small images that are held in memory, a batch at a time: cropped, mirrored, enlarged.

B batch, C channels, h x w pixels as they are stored, H x W as the model sees them
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dynnet.learning.data_config import DataConfig


def crop_and_flip(images: Tensor, config: DataConfig, total: int, mine: slice, generator: torch.Generator) -> Tensor:
    """Zero-padded random crops and mirrored halves, a batch at a time; rows `mine` of a global batch of `total`."""
    shifts = torch.randint(0, 2 * config.crop + 1, (2, total), generator=generator)[:, mine]
    mirrored = torch.rand(total, generator=generator)[mine] < 0.5
    batch, _, height, width = images.shape
    if config.crop:
        padded = F.pad(images, (config.crop,) * 4).permute(0, 2, 3, 1)
        rows = shifts[0].view(-1, 1, 1) + torch.arange(height).view(1, -1, 1)
        columns = shifts[1].view(-1, 1, 1) + torch.arange(width).view(1, 1, -1)
        images = padded[torch.arange(batch).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)
    if config.flip:
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def enlarged(images: Tensor, size: tuple[int, ...], interpolation: str) -> Tensor:
    """(B, C, h, w), 0..255, as Pillow would resize them to the size that the model sees, but not rounded."""
    if images.shape[2:] == size:
        return images
    mode = "bicubic" if interpolation == "bicubic" else "bilinear"  # torch weighs by area in these two alone
    return F.interpolate(images, size, mode=mode, antialias=True, align_corners=False).clamp(0, 255)
