"""Batch norms after a cut: what they remember of means and variances is of another network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynnet.errors import DataError
from dynnet.pruning.batches import Loader


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Loader, batches: int = 100) -> None:
    """Measure the running means and variances of all batch norms anew, in place.

    Each is the plain average over the batches, as they are met with all else in eval mode.

    Args:
        model: any; without batch norms nothing happens.
        loader: batches of (images (B, C, H, W), ...), at least one.
        batches: how many of them, at most.

    Raises:
        DataError: the loader is empty; the model is left untouched.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    device = next(model.parameters()).device
    images = _images(loader, batches)
    first = next(images, None)
    if first is None:
        raise DataError("the loader gave no batches; give it at least one image")
    with _measuring(model, norms):
        model(first.to(device))
        for more in images:
            model(more.to(device))


def _images(loader: Loader, batches: int) -> Iterator[Tensor]:
    for number, batch in enumerate(loader):
        if number >= batches:
            return
        yield batch if isinstance(batch, Tensor) else batch[0]


@contextmanager
def _measuring(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
