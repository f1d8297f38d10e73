"""Batch norms: measured anew after a cut, as what they remember of means and variances is of another network; and
under an L1 penalty on their scales, so that channels show which of them the loss defends (network slimming, Liu et al.,
https://arxiv.org/abs/1708.06519).

    B batch, C channels
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynnet.backbone.batches import Batches, Loader
from dynnet.backbone.hooks import reading
from dynnet.backbone.layers.kind import HALF
from dynnet.backbone.modes import device_of, evaluating
from dynnet.errors import NonFiniteError
from dynnet.model import every_layer


@torch.no_grad()
def recalibrate_(model: nn.Module, loader: Loader, batches: int = 100) -> None:
    """Measure the running means and variances of all batch norms anew, in place.

    They become those of all images together, as if these were one batch: mean and unbiased variance over every pixel of
    every image, whatever the sizes of the batches, down to one image. Everything is in eval mode, and norms are
    measured one after the other in the order in which they run: each sees what the norms before it give that have been
    measured already, which is what it will see in use. A norm that runs several times is measured over all of its
    calls. One that does not run in eval mode (an auxiliary head has some) stays as it is.

    This takes a pass over the images for every norm, each up to that norm: about half as many whole forwards as there
    are norms. Images are taken from the loader once and held in main memory meanwhile.

    Args:
        model: any, wrapped or not; without batch norms nothing happens.
        loader: batches of (images (B, C, H, W), ...), at least one; shuffled, or the first ones may be of one class.
        batches: how many of them, at most; some thousand images are enough.

    Raises:
        DataError: the loader is empty.
        NonFiniteError: images that give a batch norm NaN or infinity.
        Exception: what the model's forward raises. In all cases the model is left untouched.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not norms:
        return
    images = [x.cpu() for x, _ in Batches(loader, batches).on(model, labelled=False)]
    run, device = every_layer(model), device_of(model)
    with evaluating(model), _put_back_on_failure(norms.values()):
        calls = Counter[str]()
        for name in _in_running_order(run, images[0].to(device), norms):
            calls[name] += 1
            moments = _Moments()
            for batch in images:
                _measure(run, batch.to(device), name, norms[name], calls[name], moments)
            if not moments.finite():
                raise NonFiniteError(f"{name} was given NaN or infinity; check the weights and the images")
            moments.put_(norms[name], len(images))


class _Reached(Exception):  # noqa: N818 (no error)
    """The norm that is measured has been given all of its inputs: the rest of the model has nothing to do."""


def _in_running_order(run: Callable[[Tensor], object], images: Tensor, norms: Mapping[str, nn.Module]) -> list[str]:
    """The names of norms, one for each call."""
    order: list[str] = []
    with reading(norms, lambda name, x: order.append(name)):
        run(images)
    return order


def _measure(
    run: Callable[[Tensor], object], images: Tensor, name: str, norm: nn.Module, calls: int, moments: _Moments
) -> None:
    """Add what a norm is given in its first `calls` calls."""
    met = 0

    def look(name: str, x: Tensor) -> None:
        nonlocal met
        moments.add(x)
        met += 1
        if met == calls:
            raise _Reached

    with reading({name: norm}, look), contextlib.suppress(_Reached):
        run(images)


class _Moments:
    """Mean and squared deviations of every channel over all that was added, part by part (Chan et al., "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)  # (C,)
        self.squares = torch.zeros((), dtype=torch.float64)  # (C,) sums of (x - mean)^2

    def add(self, x: Tensor) -> None:
        """A part (B, C, ...)."""
        x = x.float() if x.dtype in HALF else x
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        away, total = mean.cpu().double() - self.mean, self.count + count
        self.squares = self.squares + var.cpu().double() * count + away.square() * (self.count * count / total)
        self.mean = self.mean + away * (count / total)
        self.count = total

    def finite(self) -> bool:
        return bool(self.squares.isfinite().all())

    def put_(self, norm: _BatchNorm, batches: int) -> None:
        """Let a norm remember them."""
        cast(Tensor, norm.running_mean).copy_(self.mean)
        cast(Tensor, norm.running_var).copy_(self.squares / max(self.count - 1, 1))  # of one number it is zero
        cast(Tensor, norm.num_batches_tracked).fill_(batches)


@contextlib.contextmanager
def _put_back_on_failure(norms: Iterable[nn.Module]) -> Iterator[None]:
    before = [(norm, copy.deepcopy(dict(norm.named_buffers()))) for norm in norms]
    try:
        yield
    except BaseException:
        for norm, buffers in before:
            norm.load_state_dict(buffers, strict=False)
        raise


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
