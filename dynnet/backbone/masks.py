"""Masks on weights, and other things that stand between a layer and a plain parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dynnet.backbone.layers.table import weighing_kind


class Masked(nn.Module):
    """A parametrization of a weight: zero where the mask is. Its gradient is zero there, too."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(cast(Tensor, self.mask), weight, 0.0)


def is_masked(module: nn.Module) -> bool:
    return is_parametrized(module, "weight") and isinstance(cast(Any, module).parametrizations.weight[0], Masked)


def not_plain(model: nn.Module, masked: bool = False) -> str | None:
    """Which weights are no plain parameters, and what to do, in words; None where all are.

    Args:
        model: any.
        masked: do masks count as plain?
    """
    for name, module in model.named_modules():
        if is_masked(module):
            if not masked:
                return f"{name} has a mask on its weights; call dynnet.pruning.make_permanent_(model) first"
        elif is_parametrized(module):
            return (
                f"{name} has a parametrization that is no mask; call torch.nn.utils.parametrize.remove_parametrizations"
            )
        elif weighing_kind(module) and not isinstance(module.weight, nn.Parameter):
            makers = [remedy for kind, remedy in _REMEDIES.items() for hook in _hooks(module) if isinstance(hook, kind)]
            remedy = makers[0] if makers else "torch.nn.utils.prune.remove or the like"
            return f"the weights of {name} are no parameter: a hook makes them; take it away first, with {remedy}"
    return None


_REMEDIES: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove",
}


def _hooks(module: nn.Module) -> Iterable[Any]:
    return module._forward_pre_hooks.values()
