"""Operators on the meta device, in little time.

A dry run needs the shapes that operators make. PyTorch finds those of the most frequent ones by running decompositions
in Python: a millisecond for a batch norm, half of one for a linear layer, most of the time of a dry run. Where the
arguments are the ordinary ones the answer is plain, and given at once; everything else, errors too, is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# What has the shape, type and layout of its first argument.
_LIKE_FIRST = {
    aten.relu, aten.gelu, aten.silu, aten.mish, aten.elu, aten.leaky_relu, aten.hardtanh, aten.hardswish,
    aten.hardsigmoid, aten.sigmoid, aten.tanh,
}  # fmt: skip
# The same in place.
_ONTO_FIRST = {
    aten.relu_, aten.gelu_, aten.silu_, aten.mish_, aten.elu_, aten.leaky_relu_, aten.hardtanh_, aten.hardswish_,
    aten.hardsigmoid_, aten.sigmoid_, aten.tanh_,
}  # fmt: skip
_PAIRED = {aten.add, aten.sub, aten.mul}


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func(*args, **kwargs)` returns, an operator of torch.ops, as far as shapes, types and layouts tell.

    Raises:
        Exception: whatever the operator raises.
    """
    x = args[0] if args else None
    if isinstance(x, Tensor) and x.device.type == "meta" and x.is_floating_point():
        packet = func._overloadpacket
        if packet in _ONTO_FIRST:
            return x
        if packet in _LIKE_FIRST:
            return torch.empty_like(x)
        if packet in _PAIRED and _alike(x, args[1]):
            return torch.empty_like(x)
        rule = _RULES.get(packet)
        if rule is not None and (made := rule(*args)) is not None:
            return made
    return func(*args, **kwargs)


def _alike(x: Tensor, y: Any) -> bool:
    return (
        isinstance(y, Tensor)
        and y.shape == x.shape
        and y.stride() == x.stride()
        and (y.dtype, y.device) == (x.dtype, x.device)
    )


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...] | None:
    given = [each for each in (weight, bias, mean, var) if each is not None]
    if training or mean is None or any(each.shape != x.shape[1:2] or each.dtype != x.dtype for each in given):
        return None
    return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...] | None:
    shape = tuple(shape)
    given = [each for each in (weight, bias) if each is not None]
    if tuple(x.shape[-len(shape) :]) != shape or any(
        tuple(each.shape) != shape or each.dtype != x.dtype for each in given
    ):
        return None
    kept = (*x.shape[: -len(shape)], *[1] * len(shape))
    return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept)


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and bias.shape == b.shape[1:]
    return a.new_empty(a.shape[0], b.shape[1]) if fits and bias.dtype == a.dtype == b.dtype else None


_RULES: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm: _batch_norm,
    aten.native_layer_norm: _layer_norm,
    aten.addmm: _addmm,
}
