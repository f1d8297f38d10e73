"""What pruning saves in time."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dynnet.evaluation.timing import one_at_a_time

_CALLS = 40


def time_share(model: nn.Module, other: nn.Module, size: tuple[int, int, int]) -> float:
    """Time that one image takes, as a share of what it takes in another model: the median over calls in turns.

    Args:
        model, other: as they run, folded; on one device, in one memory format.
        size: (C, H, W) of the image.
    """
    images = torch.zeros(_CALLS, *size, dtype=next(other.parameters()).dtype)
    times = one_at_a_time({"other": other, "model": model}, images)
    return float(np.median(times["model"] / times["other"]))
