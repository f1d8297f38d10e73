"""A model's twin without numbers: what it does to shapes can be tried on it, and the model itself is left alone."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dynnet.errors import ForwardError

M = TypeVar("M", bound=nn.Module)

_HOOKS = (dict, OrderedDict)


def meta_twin(model: M) -> M:
    """A copy of a model on the meta device; the model itself where all of its tensors are there already.

    Modules and tensors that the model shares, its twin shares as well. Tensors kept as plain attributes count, and so
    do those that a hook or an older `weight_norm` makes, which could not be copied with their numbers.

    Args:
        model: any. Its hooks are copied with it; one that is a closure over the model, rather than a method or an
            object, goes on to see the model.

    Raises:
        ForwardError: a lazy module has not run yet, so that its parameters have no shape.
    """
    twins: dict[int, object] = {}
    with torch.inference_mode(False):  # in which operators would not be dispatched one by one
        for module in model.modules():
            for slots in (module._parameters, module._buffers, vars(module)):
                for value in slots.values():
                    if isinstance(value, Tensor) and value.device.type != "meta":
                        twins[id(value)] = _without_numbers(value)
        if not twins:
            return model
        # deepcopy takes from its memo what it finds there. Of a module it would spend most of its time on empty hooks.
        for module in model.modules():
            twins |= {
                id(hooks): type(hooks)() for hooks in vars(module).values() if type(hooks) in _HOOKS and not hooks
            }
        return copy.deepcopy(model, twins)


def _without_numbers(tensor: Tensor) -> Tensor:
    if is_lazy(tensor):
        raise ForwardError("it has parameters without a shape (LazyLinear, say)", "run it once on images first")
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
