"""Norms. A batch norm passes channels on one by one, as does an instance norm, or an activation with a slope a channel;
the others look at several, or all, at once.

Where channels are missing, a norm that looks at several counts them as zeros, so that what is skipped equals what is
masked; cut for good, it sees only those that are left.

    B batch; C channels, k of them there
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    GroupNorm,
    GroupNorm1,
    GroupNormAct,
    LayerNorm,
    LayerNorm2d,
    LayerNormAct,
    LayerNormAct2d,
    RmsNorm,
    RmsNorm2d,
)
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import FrozenBatchNormAct2d, GroupNorm1Act, RmsNormAct, RmsNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from dynnet.backbone.layers.kind import HALF, Effect, Kind, activated, own_forward, replace_
from dynnet.backbone.subsets import Subset
from dynnet.errors import GateError


class Norm(Kind):
    """Of exact types: what a subclass does is not known.

    Attributes:
        types: these.
        tensors: parameters and statistics, one entry a channel.
    """

    types: frozenset[type]
    tensors: tuple[str, ...] = ("weight", "bias")

    def matches(self, layer: nn.Module) -> bool:
        return type(layer) in self.types

    def effect(self, layer: nn.Module) -> Effect:
        return "mixes"

    def run(self, layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
        assert reads is not None
        return activated(layer, self.normed(layer, x, reads))

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        """x with the channels of `reads` only, normalised."""
        raise NotImplementedError

    def cut_(self, layer: nn.Module, reads: Subset | None, makes: Subset | None) -> None:
        if reads is None:
            return
        stated = self.stated(layer, reads)  # first: it may refuse
        names = [name for name in self.tensors if getattr(layer, name, None) is not None]
        replace_(layer, {name: reads.take(getattr(layer, name), 0) for name in names})
        for key, value in stated.items():
            setattr(layer, key, value)

    def stated(self, layer: nn.Module, reads: Subset) -> dict[str, Any]:
        """What a layer says of its width, with only some of its channels left."""
        return {}


class Passing(Norm):
    """Passes channels on one by one."""

    tensors: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var")

    def effect(self, layer: nn.Module) -> Effect:
        return "passes"

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        norm: Any = layer
        stated = [getattr(layer, key) for key in _COUNTED if hasattr(layer, key)]
        width = stated[0] if stated else len(norm.weight)
        return width, width

    def stated(self, layer: nn.Module, reads: Subset) -> dict[str, Any]:
        return {key: len(reads) for key in _COUNTED if hasattr(layer, key)}


_COUNTED = ("num_features", "num_parameters")


class BatchNorm(Passing):
    """In eval mode a scale and a shift a channel; where it is frozen, in train mode too."""

    types = frozenset(
        {
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.SyncBatchNorm,
            BatchNormAct2d,
            SyncBatchNormAct,
            FrozenBatchNorm2d,
            FrozenBatchNormAct2d,
        }
    )

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        norm: Any = layer
        mean, var, weight, bias = _remembered(layer, reads)
        return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, norm.eps)


class InstanceNorm(Passing):
    """(x - mean) / deviation, over the pixels of a channel of one sample."""

    types = frozenset({nn.InstanceNorm1d, nn.InstanceNorm2d})

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        norm: Any = layer
        mean, var, weight, bias = _remembered(layer, reads)
        return F.instance_norm(x, mean, var, weight, bias, norm.training or mean is None, 0.0, norm.eps)


class Slopes(Passing):
    """An activation with a slope for every channel; where one holds for all, it is an operator like any other."""

    types = frozenset({nn.PReLU})
    tensors = ("weight",)

    def matches(self, layer: nn.Module) -> bool:
        return super().matches(layer) and cast(nn.PReLU, layer).num_parameters > 1

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        return F.prelu(x, reads.take(cast(nn.PReLU, layer).weight, 0))


class ShapedNorm(Norm):
    """Over all channels, which its `normalized_shape` counts: of tokens, or of maps where `maps` says so."""

    maps: frozenset[type]

    def matches(self, layer: nn.Module) -> bool:
        return super().matches(layer) and len(getattr(layer, "normalized_shape", ())) == 1

    def channel_dim(self, layer: nn.Module, x: Tensor) -> int:
        return 1 if type(layer) in self.maps else x.ndim - 1

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        shape: Any = layer.normalized_shape
        return shape[0], shape[0]

    def stated(self, layer: nn.Module, reads: Subset) -> dict[str, Any]:
        return {"normalized_shape": (len(reads),)}


class LayerNormKind(ShapedNorm):
    """(x - mean) / deviation, over the channels of a pixel or token."""

    types = frozenset({nn.LayerNorm, LayerNorm, LayerNorm2d, LayerNormAct, LayerNormAct2d})
    maps = frozenset({LayerNorm2d, LayerNormAct2d})

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        norm: Any = layer
        dim, width, given = self.channel_dim(layer, x), reads.width, x.dtype
        x = x.float() if given in HALF else x
        mean = x.sum(dim, keepdim=True) / width
        centred = x - mean
        missing = (width - len(reads)) * mean.square()
        var = (centred.square().sum(dim, keepdim=True) + missing) / width
        return _scaled(layer, centred * torch.rsqrt(var + norm.eps), reads, dim).to(given)


class RmsNormKind(ShapedNorm):
    """x / root of the mean square, over the channels of a pixel or token (Zhang & Sennrich,
    https://arxiv.org/abs/1910.07467)."""

    types = frozenset({nn.RMSNorm, RmsNorm, RmsNormAct, RmsNorm2d, RmsNormAct2d})
    maps = frozenset({RmsNorm2d, RmsNormAct2d})

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        norm: Any = layer
        dim, given = self.channel_dim(layer, x), x.dtype
        x = x.float() if given in HALF else x
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps  # of the type in which torch computes
        square = x.square().sum(dim, keepdim=True) / reads.width
        return _scaled(layer, x * torch.rsqrt(square + eps), reads, dim).to(given)


class GroupNormKind(Norm):
    """As a layer norm, over the pixels and channels of each group."""

    types = frozenset({nn.GroupNorm, GroupNorm, GroupNorm1, GroupNormAct, GroupNorm1Act})

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        norm: Any = layer
        return norm.num_channels, norm.num_channels

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        norm: Any = layer
        given = x.dtype
        x = x.float() if given in HALF else x
        per_group = norm.num_channels // norm.num_groups
        group = reads.channels() // per_group
        pixels = math.prod(x.shape[2:])
        shape = (len(x), len(reads), *[1] * (x.ndim - 2))

        def mean_of(channels: Tensor) -> Tensor:
            """(B, k) sums over the pixels of each channel to (B, groups) means over the groups."""
            sums = channels.new_zeros(len(x), norm.num_groups).index_add(1, group, channels)
            return sums / (per_group * pixels)

        mean = mean_of(x.flatten(2).sum(2))
        centred = x - mean[:, group].view(shape)
        missing = (per_group - group.bincount(minlength=norm.num_groups)) / per_group * mean.square()
        var = mean_of(centred.square().flatten(2).sum(2)) + missing
        return _scaled(layer, centred * torch.rsqrt(var + norm.eps)[:, group].view(shape), reads, 1).to(given)

    def stated(self, layer: nn.Module, reads: Subset) -> dict[str, Any]:
        norm: Any = layer
        left = (reads.channels() // (norm.num_channels // norm.num_groups)).bincount()
        if (left[left > 0] != left.max()).any():
            raise GateError(
                f"a group norm cannot be cut to groups of {left.tolist()} channels; keep equally many of each"
            )
        return {"num_channels": len(reads), "num_groups": int((left > 0).sum())}


class ResponseNorm(Norm):
    """Global response norm: x times its energy over that of the mean channel (ConvNeXt V2)."""

    types = frozenset({GlobalResponseNorm})

    def channel_dim(self, layer: nn.Module, x: Tensor) -> int:
        return x.ndim - 1 if layer.channel_dim == -1 else 1

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        norm: Any = layer
        return norm.weight.numel(), norm.weight.numel()

    def normed(self, layer: nn.Module, x: Tensor, reads: Subset) -> Tensor:
        norm: Any = layer
        given = x.dtype
        x = x.float() if given in HALF else x
        energy = x.norm(p=2, dim=norm.spatial_dim, keepdim=True)
        mean = energy.sum(norm.channel_dim, keepdim=True) / reads.width
        bias, weight = (reads.take(p, 0).view(norm.wb_shape) for p in (norm.bias, norm.weight))
        response = torch.addcmul(bias.to(x.dtype), weight.to(x.dtype), x * (energy / (mean + norm.eps)))
        return (x + response).to(given)


KINDS: tuple[Kind, ...] = (
    BatchNorm(),
    InstanceNorm(),
    Slopes(),
    LayerNormKind(),
    RmsNormKind(),
    GroupNormKind(),
    ResponseNorm(),
)


def run_with(layer: nn.Module, x: Tensor, reads: Subset | None, remembered: tuple[Tensor, Tensor] | None) -> Tensor:
    """A batch norm, in its own mode, that remembers other means and variances than its own.

    Args:
        layer: the norm.
        x: its input, with the channels of `reads` only.
        reads: channels that are there; None for all.
        remembered: (C,) each, of all channels; None for its own. In train mode those of the channels that are there are
            updated.
    """
    norm: Any = layer
    if reads is None and remembered is None:
        return own_forward(layer, x)
    whole = remembered or (norm.running_mean, norm.running_var)
    known = [*whole, norm.weight, norm.bias]
    mean, var, weight, bias = (t if t is None or reads is None else reads.take(t, 0) for t in known)
    learns = norm.training and hasattr(norm, "momentum")  # else it is frozen
    momentum = getattr(norm, "momentum", None)
    x = F.batch_norm(x, mean, var, weight, bias, learns, 0.1 if momentum is None else momentum, norm.eps)
    if learns and reads is not None:
        with torch.no_grad():
            for old, new in zip(whole, (mean, var), strict=True):
                old.index_copy_(0, reads.channels(), new)
    return activated(layer, x)


def _remembered(layer: nn.Module, reads: Subset) -> list[Tensor | None]:
    """Mean, variance, weight and bias of some channels, as far as a norm has them."""
    tensors = [getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")]
    return [None if tensor is None else reads.take(tensor, 0) for tensor in tensors]


def _scaled(layer: nn.Module, x: Tensor, reads: Subset, dim: int) -> Tensor:
    """With the weight and bias of a norm, where it has them."""
    norm: Any = layer
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    if norm.weight is not None:
        x = x * reads.take(norm.weight, 0).view(shape)
    bias = getattr(norm, "bias", None)
    return x if bias is None else x + reads.take(bias, 0).view(shape)
