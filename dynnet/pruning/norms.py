"""Batch norms: measured anew after a cut, as what they remember of means and variances is of another network; and
under an L1 penalty on their scales, so that channels show which of them the loss defends (network slimming, Liu et al.,
https://arxiv.org/abs/1708.06519)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynnet.backbone.batches import Batches, Loader
from dynnet.backbone.modes import evaluating
from dynnet.errors import NonFiniteError
from dynnet.model import every_layer


@torch.no_grad()
def recalibrate_(model: nn.Module, loader: Loader, batches: int = 100) -> None:
    """Measure the running means and variances of all batch norms anew, in place.

    Each is the plain average over the batches, as they are met with all else in eval mode.

    Args:
        model: any, wrapped or not; without batch norms nothing happens.
        loader: batches of (images (B, C, H, W), ...), at least one; shuffled, or the first ones may be of one class.
        batches: how many of them, at most.

    Raises:
        DataError: the loader is empty.
        NonFiniteError: images that give a batch norm NaN or infinity.
        Exception: what the model's forward raises. In all cases the model is left untouched.
    """
    named = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    norms = list(named.values())
    if not norms:
        return
    images = (x for x, _ in Batches(loader, batches).on(model, labelled=False))
    run = every_layer(model)
    first = next(images)  # or an empty loader says so, before anything is forgotten
    with _measuring(model, norms):
        run(first)
        for more in images:
            if len(more) > 1:  # one image says little of a variance, and nothing where a map is one pixel
                run(more)
        for name, norm in named.items():
            if not bool(cast(Tensor, norm.running_var).isfinite().all()):
                raise NonFiniteError(f"{name} was given NaN or infinity; check the weights and the images")


@contextmanager
def _measuring(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    before = [copy.deepcopy(dict(norm.named_buffers())) for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average
                norm.train()
            yield
        except BaseException:
            for norm, buffers in zip(norms, before, strict=True):
                norm.load_state_dict(buffers, strict=False)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def norm_scales(model: nn.Module) -> list[Tensor]:
    """The scales of all batch norms."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm.weight for norm in norms if norm.weight is not None]


@torch.no_grad()
def shrink_scales_(model: nn.Module, step: float) -> None:
    """One step of the penalty, in place: scales go towards zero by so much, and stop there. The proximal form does the
    same under any optimiser."""
    for scale in norm_scales(model):
        scale -= scale.clamp(-step, step)
