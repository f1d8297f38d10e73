"""The table of layer kinds, and what it is asked. A new kind is one class in `weighing.py` or `norms.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynnet.backbone.layers import norms, weighing
from dynnet.backbone.layers.kind import Effect, Kind, own_forward
from dynnet.backbone.layers.weighing import Weighing
from dynnet.backbone.subsets import Subset

KINDS: tuple[Kind, ...] = (*weighing.KINDS, *norms.KINDS)


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer; None for modules that are followed op by op."""
    return next((kind for kind in KINDS if kind.matches(layer)), None)


def known(layer: nn.Module) -> Kind:
    """The kind of a layer that has one."""
    kind = kind_of(layer)
    assert kind is not None, type(layer)
    return kind


def weighing_kind(layer: nn.Module) -> Weighing | None:
    """The kind of a convolution, depthwise ones too, or a linear layer; None for other modules."""
    kind = kind_of(layer)
    return kind if isinstance(kind, Weighing) else None


def is_batch_norm(layer: nn.Module) -> bool:
    """Is it, in eval mode, a scale and a shift a channel, by what it remembers of means and variances?"""
    return isinstance(kind_of(layer), norms.BatchNorm) and layer.running_mean is not None


def by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a weighing layer, or what has its shape, as (O, I / groups, ...); given that, the layer's own."""
    kind = weighing_kind(layer)
    assert kind is not None, type(layer)
    return kind.by_output(layer, weight)


def effect_of(layer: nn.Module) -> Effect | None:
    """What a layer does to channels, None for modules that are followed op by op."""
    kind = kind_of(layer)
    return None if kind is None else kind.effect(layer)


def channel_dim(layer: nn.Module, x: Tensor) -> int:
    """The dimension of a known layer's input that holds its channels."""
    return known(layer).channel_dim(layer, x)


def run(layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
    """What `layer` makes of an input that has only some of its channels.

    Args:
        layer: of a known kind; a batch norm in eval mode.
        x: the input, with the channels of `reads` only, in their order.
        reads: input channels that are there; None for all. Those that are missing count as zero.
        makes: output channels wanted; None for all. What passes channels on, a depthwise convolution or a norm, makes
            those that it reads.

    Returns:
        The output, with the channels of `makes` only.
    """
    return own_forward(layer, x) if reads is None and makes is None else known(layer).run(layer, x, reads, makes)


def cut_(layer: nn.Module, reads: Subset | None, makes: Subset | None) -> None:
    """Narrow a layer for good, in place: its parameters, its statistics, and the widths that it states.

    What is left computes what `run` does on the same channels, except where a layer looks at all of its channels at
    once: a norm over channels, or weights standardised over the inputs, then see those only that are left.

    Args:
        layer: of a known kind.
        reads, makes: as in `run`.

    Raises:
        GateError: the groups of a group norm would be of different sizes; the layer is left as it was.
    """
    known(layer).cut_(layer, reads, makes)


def stated_widths(module: nn.Module) -> tuple[int, int] | None:
    """Channels that a module makes and reads; None where it says nothing of them.

    What stands in a known layer's place, a folded norm, states the same as that did.
    """
    kind = kind_of(module)
    if kind is not None:
        return kind.widths(module)
    stated: Any = module
    for made, read in (("out_channels", "in_channels"), ("out_features", "in_features")):
        if hasattr(module, made):
            return getattr(stated, made), getattr(stated, read)
    for key in ("num_features", "num_channels"):
        if hasattr(module, key):
            return getattr(stated, key), getattr(stated, key)
    return None
