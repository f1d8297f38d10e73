"""Layers that weigh their inputs: convolutions and linear layers. O outputs, I inputs of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.layers import Linear as TimmLinear
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynnet.backbone.layers.kind import Effect, Kind, own_forward, replace_
from dynnet.backbone.subsets import Subset


class Weighing(Kind):
    """A layer with a `weight` and perhaps a `bias`, which makes outputs that are sums over inputs."""

    plain: tuple[type, ...]  # exact types whose forward is known

    def effect(self, layer: nn.Module) -> Effect:
        return "weighs"

    def is_plain(self, layer: nn.Module) -> bool:
        """Is the forward what the class of torch's says, so that somebody else may do the same in its place?"""
        return type(layer) in self.plain

    def macs(self, layer: nn.Module, x: Tensor, output: Tensor) -> int:
        """Multiply-adds of one call, of all samples."""
        weight: Any = layer.weight
        return int(weight[0].numel() * output.numel())

    def by_output(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """A weight of the layer, or what has its shape, as (O, I / groups, ...); given that, the layer's own shape."""
        return weight

    def weights_as_they_are(self, layer: nn.Module) -> bool:
        """Not where they are standardised before they are used: a zero would not be one there."""
        return not isinstance(layer, (StdConv2d, ScaledStdConv2d))

    def narrowed(
        self, layer: nn.Module, weight: Tensor, bias: Tensor | None, reads: Subset | None, makes: Subset | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """A weight and a bias with some of their channels, and how many groups are left.

        Where a layer has groups, whole groups are chosen.
        """
        return narrowed(weight, bias, getattr(layer, "groups", 1), reads, makes)

    def cut_(self, layer: nn.Module, reads: Subset | None, makes: Subset | None) -> None:
        changed: Any = layer
        weight, bias, groups = self.narrowed(layer, changed.weight, changed.bias, reads, makes)
        made, read = self.widths(layer)
        replace_(layer, {"weight": weight, "bias": bias})
        if hasattr(layer, "groups"):
            # What has groups keeps whole ones: both sides shrink alike.
            share = groups / changed.groups
            made = round(made * share) if changed.groups > 1 else made if makes is None else len(makes)
            read = round(read * share) if changed.groups > 1 else read if reads is None else len(reads)
            changed.out_channels, changed.in_channels, changed.groups = made, read, groups
        else:
            changed.out_features = made if makes is None else len(makes)
            changed.in_features = read if reads is None else len(reads)
        gain = getattr(layer, "gain", None)
        if gain is not None and makes is not None:  # of a scaled, weight-standardised convolution
            replace_(layer, {"gain": makes.take(gain, 0)})


class Linear(Weighing):
    """Along the last dimension."""

    plain = (nn.Linear, TimmLinear)

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        linear: Any = layer
        return linear.out_features, linear.in_features

    def channel_dim(self, layer: nn.Module, x: Tensor) -> int:
        return x.ndim - 1

    def run(self, layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
        if not self.is_plain(layer):
            return _let_it(layer, x, reads, makes)
        linear: Any = layer
        weight, bias, _ = self.narrowed(layer, linear.weight, linear.bias, reads, makes)
        return F.linear(x, weight, bias)


class Convolution(Weighing):
    """Of sequences or maps; depthwise, it passes channels on one by one."""

    plain = (nn.Conv1d, nn.Conv2d, Conv2dSame)

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, (nn.Conv1d, nn.Conv2d))

    def effect(self, layer: nn.Module) -> Effect:
        conv: Any = layer
        return "passes" if 1 < conv.groups == conv.in_channels == conv.out_channels else "weighs"

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        conv: Any = layer
        return conv.out_channels, conv.in_channels

    def run(self, layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
        conv: Any = layer
        if not self.is_plain(layer) or conv.padding_mode != "zeros":
            return _let_it(layer, x, reads, makes)
        weight, bias, groups = self.narrowed(layer, conv.weight, conv.bias, reads, makes)
        padding: Any = conv.padding
        if isinstance(layer, Conv2dSame):
            x, padding = pad_same(x, layer.kernel_size, layer.stride, layer.dilation), 0
        convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        return convolve(x, weight, bias, conv.stride, padding, conv.dilation, groups)


class TransposedConvolution(Weighing):
    """Of maps, called without an output size; its weight is (I, O / groups, H, W)."""

    plain = (nn.ConvTranspose2d,)

    def matches(self, layer: nn.Module) -> bool:
        return type(layer) is nn.ConvTranspose2d

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        conv: Any = layer
        return conv.out_channels, conv.in_channels

    def macs(self, layer: nn.Module, x: Tensor, output: Tensor) -> int:
        weight: Any = layer.weight
        return int(weight[0].numel() * x.numel())

    def by_output(self, layer: nn.Module, weight: Tensor) -> Tensor:
        groups: Any = layer.groups
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    def narrowed(
        self, layer: nn.Module, weight: Tensor, bias: Tensor | None, reads: Subset | None, makes: Subset | None
    ) -> tuple[Tensor, Tensor | None, int]:
        groups: Any = layer.groups
        if groups > 1:  # whole ones, one after the other along the inputs
            chosen = makes or reads
            if chosen is None:
                return weight, bias, groups
            left = Subset((chosen.channels() // (chosen.width // groups)).unique(), 1, groups)

            def whole(parameter: Tensor) -> Tensor:
                return left.take(parameter.unflatten(0, (groups, -1)), 0).flatten(0, 1)

            return whole(weight), None if bias is None else whole(bias), len(left)
        weight = weight if reads is None else reads.take(weight, 0)
        weight = weight if makes is None else makes.take(weight, 1)
        return weight, bias if bias is None or makes is None else makes.take(bias, 0), 1

    def run(self, layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
        conv: Any = layer
        weight, bias, groups = self.narrowed(layer, conv.weight, conv.bias, reads, makes)
        return F.conv_transpose2d(
            x, weight, bias, conv.stride, conv.padding, conv.output_padding, groups, conv.dilation
        )


KINDS: tuple[Kind, ...] = (Convolution(), TransposedConvolution(), Linear())


def narrowed(
    weight: Tensor, bias: Tensor | None, groups: int, reads: Subset | None, makes: Subset | None
) -> tuple[Tensor, Tensor | None, int]:
    """A weight (O, I / groups, ...) and a bias (O,) of some of their channels, and how many groups are left.

    Args:
        groups: of the whole layer; where there are several, whole groups are chosen.
        reads, makes: as in `dynnet.backbone.layers.table.run`.
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


def _let_it(layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
    """Its forward does something to weights or images first (weight standardisation): let it, and narrow what it hands
    to the convolution."""
    with _Narrowing(reads, makes):
        return own_forward(layer, x)


class _Narrowing(TorchFunctionMode):
    def __init__(self, reads: Subset | None, makes: Subset | None) -> None:
        super().__init__()
        self.reads, self.makes = reads, makes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = _WEIGHED.get(func)
        if names is None:
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        weight, bias, groups = narrowed(
            given["weight"], given.get("bias"), given.get("groups", 1), self.reads, self.makes
        )
        given |= {"weight": weight, "bias": bias} | ({"groups": groups} if "groups" in names else {})
        return func(**given)


_CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_WEIGHED: Mapping[Any, tuple[str, ...]] = {
    F.conv1d: _CONVOLVED,
    F.conv2d: _CONVOLVED,
    F.linear: ("input", "weight", "bias"),
}
