"""What pruning saves in time."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dynnet.fold import fold
from dynnet.latency import memory_format, take_turns
from dynnet.probe import device_of

_CALLS, _WARMUP = 40, 5


def time_share(model: nn.Module, other: nn.Module, size: tuple[int, int, int]) -> float:
    """Time that one image takes, as a share of what it takes in another model: the median over calls in turns, both
    with their batch norms folded.

    Args:
        model, other: on one device, in one memory format.
        size: (C, H, W) of the image.
    """
    dtype = next(other.parameters()).dtype
    image = torch.zeros(1, *size, device=device_of(other), dtype=dtype)
    image = image.contiguous(memory_format=memory_format(other))
    times = take_turns({"model": fold(model, size), "other": fold(other, size)}, [image] * (_CALLS + _WARMUP), _WARMUP)
    return float(np.median(times["model"] / times["other"]))
