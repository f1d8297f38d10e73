"""A layer on a subset of its channels: run on it, as gates choose for every input, or cut to it for good.

C channels, k of them chosen, u channels in a block
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from timm.layers.grn import GlobalResponseNorm
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynnet.backbone.gather import pick
from dynnet.backbone.kinds import channel_dim
from dynnet.errors import GateError

HALF = (torch.float16, torch.bfloat16)  # sums over channels or pixels are taken in single precision, or overflow


@dataclass(frozen=True)
class Subset:
    """Channels, as whole blocks of neighbours: blocks are copied at once, single channels one by one.

    Attributes:
        blocks: (k / u,) int64, ascending.
        size: u.
        width: C, of all channels.
    """

    blocks: Tensor
    size: int
    width: int

    def __len__(self) -> int:
        return len(self.blocks) * self.size

    def take(self, x: Tensor, dim: int) -> Tensor:
        """The chosen entries of a tensor along one dimension of size C."""
        return pick(x, dim, self.blocks.to(x.device), self.size)

    def channels(self) -> Tensor:
        """(k,) int64."""
        return (self.blocks[:, None] * self.size + torch.arange(self.size, device=self.blocks.device)).flatten()


def subset(channels: Tensor, width: int) -> Subset:
    """Any ascending channels (k,) of `width`, k > 0, in the largest blocks that they fill."""
    size = 1
    while width % (2 * size) == 0 and len(channels) % (2 * size) == 0:
        runs = channels.view(-1, 2 * size)
        steps = torch.arange(2 * size, device=channels.device)
        if not bool((runs == runs[:, :1] // (2 * size) * (2 * size) + steps).all()):
            break
        size *= 2
    return Subset(channels.view(-1, size)[:, 0] // size, size, width)


def run(layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
    """What `layer` makes of an input that has only some of its channels.

    Args:
        layer: of a kind that `dynnet.backbone.kinds.layer_kind` knows; a batch norm in eval mode.
        x: the input, with the channels of `reads` only, in their order.
        reads: input channels that are there; None for all. Those that are missing count as zero.
        makes: output channels wanted; None for all. What passes channels on, a depthwise convolution or a norm, makes
            those that it reads.

    Returns:
        The output, with the channels of `makes` only.
    """
    if reads is None and makes is None:
        return _forward(layer, x)
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        return _weigh(layer, x, reads, makes)
    assert reads is not None
    if isinstance(layer, nn.LayerNorm):
        x = _layer_norm(layer, x, reads)
    elif isinstance(layer, nn.GroupNorm):
        x = _group_norm(layer, x, reads)
    elif isinstance(layer, GlobalResponseNorm):
        return _response_norm(layer, x, reads)
    else:
        assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
        mean, var, weight, bias = (
            None if p is None else reads.take(p, 0)
            for p in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        x = F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, layer.eps)
    timms: Any = layer  # its norms may hold the activation that follows
    return cast(Tensor, timms.act(timms.drop(x))) if hasattr(layer, "act") else x


def cut(layer: nn.Module, reads: Subset | None, makes: Subset | None) -> None:
    """Narrow a layer for good, in place: its parameters, its statistics, and the widths that it states.

    What is left computes what `run` does on the same channels, except where a layer looks at all of its channels at
    once: a norm over channels, or weights standardised over the inputs, then see those only that are left.

    Args:
        layer: of a kind that `dynnet.backbone.kinds.layer_kind` knows.
        reads, makes: as in `run`.

    Raises:
        GateError: the groups of a group norm would be of different sizes.
    """
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        weight, bias, groups = narrowed(layer.weight, layer.bias, getattr(layer, "groups", 1), reads, makes)
        _replace(layer, {"weight": weight, "bias": bias})
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
            return
        layer.out_channels, layer.in_channels, layer.groups = len(weight), weight.shape[1] * groups, groups
        gain = getattr(layer, "gain", None)
        if gain is not None and makes is not None:  # of a scaled, weight-standardised convolution
            _replace(layer, {"gain": makes.take(gain, 0)})
        return
    if reads is None:
        return
    groups_left = 0
    if isinstance(layer, nn.GroupNorm):
        left = (reads.channels() // (layer.num_channels // layer.num_groups)).bincount()
        groups_left = int((left > 0).sum())
        if (left[left > 0] != left.max()).any():
            raise GateError(
                f"a group norm cannot be cut to groups of {left.tolist()} channels; keep equally many of each"
            )
    names = [n for n in ("weight", "bias", "running_mean", "running_var") if getattr(layer, n, None) is not None]
    _replace(layer, {name: reads.take(getattr(layer, name), 0) for name in names})
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(reads),)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels, layer.num_groups = len(reads), groups_left
    elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        layer.num_features = len(reads)


def _replace(layer: nn.Module, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        old = getattr(layer, name)
        if tensor is not None and tensor is not old:
            tensor = tensor.detach()
            setattr(layer, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def narrowed(
    weight: Tensor, bias: Tensor | None, groups: int, reads: Subset | None, makes: Subset | None
) -> tuple[Tensor, Tensor | None, int]:
    """A weight (O, I / groups, ...) and a bias (O,) of some of their channels, and how many groups are left.

    Args:
        groups: of the whole layer; where there are several, whole groups are chosen.
        reads, makes: as in `run`.
    """
    if groups > 1:
        makes = makes or reads
        if makes is None:
            return weight, bias, groups
        groups, reads = groups * len(makes) // makes.width, None
    if makes is not None:
        weight = makes.take(weight, 0)
        bias = None if bias is None else makes.take(bias, 0)
    if reads is not None:
        weight = reads.take(weight, 1)
    return weight, bias, groups


def _weigh(layer: nn.Conv2d | nn.Linear, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
    exact = type(layer) in (nn.Conv2d, Conv2dSame, nn.Linear, TimmLinear)
    if exact and isinstance(layer, nn.Linear):
        weight, bias, _ = narrowed(layer.weight, layer.bias, 1, reads, makes)
        return F.linear(x, weight, bias)
    if exact and isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        weight, bias, groups = narrowed(layer.weight, layer.bias, layer.groups, reads, makes)
        padding: Any = layer.padding
        if isinstance(layer, Conv2dSame):
            x, padding = pad_same(x, layer.kernel_size, layer.stride, layer.dilation), 0
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, groups)
    # Its forward does something to weights or images first (weight standardisation): let it, and narrow what it hands
    # to the convolution.
    with _Narrowing(reads, makes):
        return _forward(layer, x)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    # The class's: the instance's may be what called `run`.
    return cast(Tensor, type(layer).forward(layer, x))


class _Narrowing(TorchFunctionMode):
    def __init__(self, reads: Subset | None, makes: Subset | None) -> None:
        super().__init__()
        self.reads, self.makes = reads, makes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            given = dict(
                zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)
            )
            given |= kwargs or {}
            given["weight"], given["bias"], given["groups"] = narrowed(
                given["weight"], given.get("bias"), given.get("groups", 1), self.reads, self.makes
            )
            return F.conv2d(**given)
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            weight, bias, _ = narrowed(given["weight"], given.get("bias"), 1, self.reads, self.makes)
            return F.linear(given["input"], weight, bias)
        return func(*args, **(kwargs or {}))


def _layer_norm(layer: nn.LayerNorm, x: Tensor, reads: Subset) -> Tensor:
    """Over all channels, of which the missing ones are zero."""
    dim, width, given = channel_dim(layer, x), reads.width, x.dtype
    x = x.float() if given in HALF else x
    mean = x.sum(dim, keepdim=True) / width
    centred = x - mean
    missing = (width - len(reads)) * mean.square()
    var = (centred.square().sum(dim, keepdim=True) + missing) / width
    return _scaled(layer, centred * torch.rsqrt(var + layer.eps), reads, dim).to(given)


def _group_norm(layer: nn.GroupNorm, x: Tensor, reads: Subset) -> Tensor:
    """Over all channels of each group, of which the missing ones are zero."""
    given = x.dtype
    x = x.float() if given in HALF else x
    per_group = layer.num_channels // layer.num_groups
    group = reads.channels() // per_group
    pixels = math.prod(x.shape[2:])
    shape = (len(x), len(reads), *[1] * (x.ndim - 2))

    def mean_of(channels: Tensor) -> Tensor:
        """(B, k) sums over the pixels of each channel to (B, groups) means over the groups."""
        sums = channels.new_zeros(len(x), layer.num_groups).index_add(1, group, channels)
        return sums / (per_group * pixels)

    mean = mean_of(x.flatten(2).sum(2))
    centred = x - mean[:, group].view(shape)
    missing = (per_group - group.bincount(minlength=layer.num_groups)) / per_group * mean.square()
    var = mean_of(centred.square().flatten(2).sum(2)) + missing
    return _scaled(layer, centred * torch.rsqrt(var + layer.eps)[:, group].view(shape), reads, 1).to(given)


def _scaled(layer: nn.LayerNorm | nn.GroupNorm, x: Tensor, reads: Subset, dim: int) -> Tensor:
    """With the weight and bias of a norm."""
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    if layer.weight is not None:
        x = x * reads.take(layer.weight, 0).view(shape)
    return x if layer.bias is None else x + reads.take(layer.bias, 0).view(shape)


def _response_norm(layer: GlobalResponseNorm, x: Tensor, reads: Subset) -> Tensor:
    """As timm's, with the mean over all channels, of which the missing ones are zero."""
    given = x.dtype
    x = x.float() if given in HALF else x
    energy = x.norm(p=2, dim=layer.spatial_dim, keepdim=True)
    mean = energy.sum(layer.channel_dim, keepdim=True) / reads.width
    bias, weight = (reads.take(p, 0).view(layer.wb_shape) for p in (layer.bias, layer.weight))
    return (x + torch.addcmul(bias.to(x.dtype), weight.to(x.dtype), x * (energy / (mean + layer.eps)))).to(given)
