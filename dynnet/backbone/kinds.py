"""What kinds of layers there are, seen by what they do to channels."""

from __future__ import annotations

from typing import Literal

from timm.layers import (
    BatchNormAct2d,
    GroupNorm,
    GroupNorm1,
    GroupNormAct,
    LayerNorm,
    LayerNorm2d,
    LayerNormAct,
    LayerNormAct2d,
)
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import GroupNorm1Act
from torch import Tensor, nn

# Exact types: what a subclass does is not known.
_BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d}
_LAYER_NORMS = {nn.LayerNorm, LayerNorm, LayerNorm2d, LayerNormAct, LayerNormAct2d}
_GROUP_NORMS = {nn.GroupNorm, GroupNorm, GroupNorm1, GroupNormAct, GroupNorm1Act}


def layer_kind(module: nn.Module) -> Literal["weighs", "passes", "mixes"] | None:
    """What a layer does to channels, None for modules that are followed op by op.

    A convolution or linear layer "weighs" its inputs; a depthwise one or a batch norm "passes" channels on one by one;
    a layer norm, group norm or global response norm "mixes" them.
    """
    if isinstance(module, nn.Conv2d):
        return "passes" if 1 < module.groups == module.in_channels == module.out_channels else "weighs"
    if isinstance(module, nn.Linear):
        return "weighs"
    if type(module) in _BATCH_NORMS:
        return "passes"
    if isinstance(module, GlobalResponseNorm) or type(module) in _GROUP_NORMS:
        return "mixes"
    if isinstance(module, nn.LayerNorm) and type(module) in _LAYER_NORMS:
        return "mixes" if len(module.normalized_shape) == 1 else None
    return None


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """The dimension of a layer's input that holds its channels."""
    last = isinstance(module, (nn.Linear, nn.LayerNorm)) and not isinstance(module, (LayerNorm2d, LayerNormAct2d))
    if isinstance(module, GlobalResponseNorm):
        last = module.channel_dim == -1
    return x.ndim - 1 if last else 1
