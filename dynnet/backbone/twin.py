"""Copies of a model: with all of its numbers; and its twin without any, on which it can be tried what the model does to
shapes, while the model itself is left alone."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from dynnet.backbone.names import title
from dynnet.errors import ForwardError, UnsupportedError

M = TypeVar("M", bound=nn.Module)

_HOOKS = (dict, OrderedDict)
_REGISTERED = ("_parameters", "_buffers", "_modules")


def meta_twin(model: M) -> M:
    """A copy of a model on the meta device; the model itself where all of its tensors are there already.

    Modules and tensors that the model shares, its twin shares as well. Tensors kept as plain attributes count, also in
    lists and dictionaries, and so do those that a hook or an older `weight_norm` makes.

    Args:
        model: any. Its hooks are copied with it; one that is a closure over the model, rather than a method or an
            object, goes on to see the model.

    Raises:
        ForwardError: a lazy module has not run yet, so that its parameters have no shape.
        UnsupportedError: it cannot be copied.
    """
    with torch.inference_mode(False):  # in which operators would not be dispatched one by one
        twins = {id(x): _without_numbers(x) for x in _tensors(model) if x.device.type != "meta"}
        return _copied(model, twins) if twins else model


def copy_of(model: M) -> M:
    """A deep copy, hooks and all. Tensors that a forward has left on it, as an older `weight_norm` does, are copied
    without the way in which they came to be.

    Raises:
        UnsupportedError: it cannot be copied.
    """
    return _copied(model, {id(x): x.detach().clone() for x in _tensors(model) if not x.is_leaf})


def _copied(model: M, copies: dict[int, Any]) -> M:
    """A deep copy in which some objects, by identity, are others."""
    # deepcopy takes from its memo what it finds there. Of a module it would spend most of its time on empty hooks.
    for module in model.modules():
        copies |= {id(hooks): type(hooks)() for hooks in vars(module).values() if type(hooks) in _HOOKS and not hooks}
    try:
        return copy.deepcopy(model, copies)
    except Exception as raised:
        raise UnsupportedError(
            f"{title(model)} cannot be copied ({type(raised).__name__}: {raised}); take away the attribute or the hook "
            f"that cannot"
        ) from raised


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """All that modules hold, by whatever name, also in lists and dictionaries."""
    for module in model.modules():
        yield from (x for slots in (module._parameters, module._buffers) for x in slots.values() if x is not None)
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (dict, list, tuple)) and value and key not in _REGISTERED:
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _without_numbers(tensor: Tensor) -> Tensor:
    if is_lazy(tensor):
        raise ForwardError("it has parameters without a shape (LazyLinear, say)", "run it once on images first")
    if tensor.is_mkldnn:  # packed by a kernel for itself, in a layout that there is nowhere else
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
