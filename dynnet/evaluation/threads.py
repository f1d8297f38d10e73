"""As many threads as the layers of a model can feed.

Every operator wakes its threads and waits for the last of them. With little arithmetic between two waits a second
thread gains nothing, and beside other work it costs: whoever is ready spins until the one that has lost its core comes
back. Programs that train or time choose here; the library itself never does.

The number is a function of shapes, not of a clock: sums are taken in the order in which threads share them, and a run
that is resumed has to give the same numbers.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from dynnet.backbone.dry_run import trace
from dynnet.backbone.modes import device_of
from dynnet.model import DynamicModel

# Multiply-adds of a layer that feed one thread. Measured on two cores, channels_last, gain of two threads over one:
# training, at 1 M 1.1, 7 M 1.1 to 1.3, 30 M 1.4, 119 M 1.9; inference, at 0.02 M 0.9, 3 M 1.2, 30 M 1.7.
MACS_PER_THREAD = 5_000_000
_TOLD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MOST = torch.get_num_threads()  # as many as torch would take, before anybody here has chosen


def fit_threads(model: nn.Module, input_size: tuple[int, int, int], batch_size: int) -> str:
    """Set the number of threads of this process for a model's forwards, with backwards or without.

    Where OMP_NUM_THREADS or MKL_NUM_THREADS says how many, and for models on other devices, nothing is changed.

    Args:
        model: a backbone, or a dynamic model, of which the backbone counts.
        input_size: (C, H, W).
        batch_size: images of one forward in this process.

    Returns:
        What was chosen, and why, in a line for people.
    """
    told = next((name for name in _TOLD if name in os.environ), None)
    if told or device_of(model).type != "cpu":
        return f"{_threads(torch.get_num_threads())}" + f", as {told} says" * bool(told)
    backbone = model.backbone if isinstance(model, DynamicModel) else model
    cost = trace(backbone, input_size, 1)
    layers = sum(1 for macs in cost.layers.values() if macs)
    share = cost.macs * batch_size / max(layers, 1)
    torch.set_num_threads(max(1, min(_MOST, int(share // MACS_PER_THREAD))))
    return (
        f"{_threads(torch.get_num_threads())} of {_MOST}, for {share / 1e6:.2f} M multiply-adds a layer in a batch of "
        f"{batch_size} (OMP_NUM_THREADS=n sets n)"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
