"""Batch norms: measured anew after a cut, as what they remember of means and variances is of another network; and
under an L1 penalty on their scales, so that channels show which of them the loss defends (network slimming, Liu et al.,
https://arxiv.org/abs/1708.06519).

    B batch, C channels
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
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

_GROUP = 128  # images, among which norms scale what they are given while they are measured


@torch.no_grad()
def recalibrate_(model: nn.Module, loader: Loader, batches: int = 100) -> None:
    """Measure the running means and variances of all batch norms anew, in place.

    They become those of all images together: mean and unbiased variance over every pixel of every image, whatever the
    sizes of the loader's batches, down to one image. Meanwhile every norm scales what it is given as in training, over
    groups of some hundred images drawn at random, so that the norms behind it see what they will see in use; all else
    is in eval mode. A norm that runs several times is measured over all of its calls; one that does not run in eval
    mode (an auxiliary head has some) stays as it is.

    Args:
        model: any, wrapped or not; without batch norms nothing happens.
        loader: batches of (images (B, C, H, W), ...), at least one; shuffled, or the first ones may be of one class.
            They are held in main memory.
        batches: how many of them, at most; some thousand images are enough.

    Raises:
        DataError: the loader is empty.
        NonFiniteError: images that give a batch norm NaN or infinity.
        Exception: what the model's forward raises. In all cases the model is left untouched.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not norms:
        return
    groups = _groups(x.cpu() for x, _ in Batches(loader, batches).on(model, labelled=False))
    found: dict[str, _Moments] = {}

    def look(name: str, x: Tensor) -> None:
        given = _Moments()
        given.add(x)
        given.put_(norms[name])
        found.setdefault(name, _Moments()).join(given)

    run, device = every_layer(model), device_of(model)
    with evaluating(model), _put_back_on_failure(norms.values()):
        with reading(norms, look):
            for group in groups:
                run(torch.stack(group).to(device))
        for name, moments in found.items():
            if not moments.finite():
                raise NonFiniteError(f"{name} was given NaN or infinity; check the weights and the images")
            moments.put_(norms[name])
            cast(Tensor, norms[name].num_batches_tracked).fill_(len(groups))


def _groups(batches: Iterable[Tensor]) -> list[list[Tensor]]:
    """Images at random, in groups of one size."""
    of_size: dict[torch.Size, list[Tensor]] = {}
    for batch in batches:
        of_size.setdefault(batch.shape[1:], []).extend(batch)
    groups = []
    for images in of_size.values():
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        for group in order.tensor_split(max(1, round(len(images) / _GROUP))):
            groups.append([images[i] for i in group.tolist()])
    return groups


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
        part = _Moments()
        part.count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        part.mean, part.squares = mean.cpu().double(), var.cpu().double() * part.count
        self.join(part)

    def join(self, other: _Moments) -> None:
        """Everything that was added to another."""
        away, total = other.mean - self.mean, self.count + other.count
        self.squares = self.squares + other.squares + away.square() * (self.count * other.count / total)
        self.mean = self.mean + away * (other.count / total)
        self.count = total

    def finite(self) -> bool:
        return bool(self.squares.isfinite().all())

    def put_(self, norm: _BatchNorm) -> None:
        """Let a norm remember them."""
        cast(Tensor, norm.running_mean).copy_(self.mean)
        cast(Tensor, norm.running_var).copy_(self.squares / max(self.count - 1, 1))  # of one number it is zero


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
