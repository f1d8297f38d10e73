"""What `timm.create_model` makes of the words in a file: an architecture, within bounds, and nothing else happens."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from dynnet.errors import did_you_mean
from dynnet.pruning.shape import Shape, shape_of

# What timm itself does with an argument: it asks servers, opens files, or makes something that is no classifier.
_RESERVED = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("pruned", "features_only", "out_indices", "feature_cls"),
} - {"model_name"}
_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # of an architecture, with the tag of its weights
_LARGEST, _LONGEST = 10**6, 64  # number and list among the arguments of an architecture


class Most(NamedTuple):
    """How large a model may be.

    Attributes:
        parts: modules and tensors.
        weights, buffers: entries of all parameters, and of all buffers.
    """

    parts: int
    weights: int
    buffers: int

    @classmethod
    def beside(cls, tensors: Mapping[str, Tensor]) -> Most:
        """What a file with these tensors can be of: a pruned one was made from a much larger model. Of timm's own, none
        has more than 4 modules for each tensor, or more entries in its tables than twice those in its weights."""
        entries = sum(t.numel() for t in tensors.values())
        return cls(16 * len(tensors) + 4096, 1024 * entries + 2**24, 16 * entries + 2**24)


def unknown_to_timm(name: str) -> str | None:
    """That timm has no model of a name, or no weights of a tag behind its dot, in words; None where it does."""
    if not timm.is_model(name):
        return f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}"
    if "." in name and not timm.is_model_pretrained(name):
        base = name.partition(".")[0]
        known = timm.list_pretrained(f"{base}.*")
        return (
            f"timm has {base}, but no weights {name!r}{did_you_mean(name, known)}; it has {', '.join(known) or 'none'}"
        )
    return None


def not_architecture(create: Mapping[str, Any]) -> str | None:
    """What of the arguments for `timm.create_model` is more than an architecture, in words; None where nothing is.

    An architecture is a name that timm has registered, and numbers, texts, truth values and lists of them. To build it
    asks no server and opens no file.
    """
    name = create.get("model_name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not timm.is_model(name):
        return f"timm has no model {name!r}"
    for key, value in create.items():
        if key in _RESERVED:
            return f"{key!r} is no argument of an architecture"
        if not _is_plain(value):
            return f"{key}={value!r}: expected numbers up to {_LARGEST}, short texts, or lists of them"
    return None


def fresh_of(create: Mapping[str, Any]) -> nn.Module | None:
    """What timm builds, without numbers; None where it cannot, or the arguments are no architecture."""
    if not_architecture(create):
        return None
    try:
        with torch.device("meta"):
            return timm.create_model(**create, pretrained=False)
    except Exception:  # timm's, or of whoever has registered the model
        return None


def hollow(create: Mapping[str, Any], most: Most) -> nn.Module:
    """What timm builds; its parameters wait for their numbers, all else, tables of positions say, is there.

    Args:
        create: an architecture.
        most: how large it may be. What is larger takes no memory.

    Raises:
        ValueError: timm cannot build it, or it is too large.
    """
    meta: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def emptied(parameter: Tensor) -> Tensor:
        if parameter.is_meta or is_lazy(parameter):
            return parameter
        if parameter not in meta:  # tied ones stay tied
            meta[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        return meta[parameter]

    try:
        with torch.device("meta"), _bounded(most, lambda parameter: parameter):
            timm.create_model(**create, pretrained=False)
        with _bounded(most, emptied):
            return timm.create_model(**create, pretrained=False)
    except Exception as error:  # timm's, or of whoever has registered the model
        raise ValueError(f"{type(error).__name__}: {error}") from error


def give_memory_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Parameters that wait for their numbers get room for them, of the type of the tensor of their name."""
    given: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in given:
                key = f"{prefix}.{name}" if prefix else name
                dtype = tensors[key].dtype if key in tensors else parameter.dtype
                given[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
            module._parameters[name] = given[id(parameter)]


def pruned_shape(backbone: nn.Module, create: Mapping[str, Any]) -> Shape:
    """How a backbone differs from the one that timm builds; not at all where timm cannot tell."""
    fresh = fresh_of(create)
    return Shape() if fresh is None else shape_of(backbone, fresh)


def timm_name(backbone: nn.Module) -> str | None:
    """With the tag of its pretrained weights, on which input size and normalisation depend, where timm knows it."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    name, tag = config.get("architecture"), config.get("tag")
    tagged = f"{name}.{tag}"
    return tagged if tag and timm.is_model_pretrained(tagged) else name


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < 3 and len(value) <= _LONGEST and all(_is_plain(entry, depth + 1) for entry in value)
    if isinstance(value, str):
        return len(value) <= _LONGEST
    # Of the numbers in lists many are blocks of stages, which add up.
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= _LARGEST / (16 if depth else 1))


@contextmanager
def _bounded(most: Most, changed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, what this thread builds is counted, and its parameters are `changed`."""
    thread, counted = threading.get_ident(), {"parts": 0, "weights": 0, "buffers": 0}

    def count(kind: str, tensor: Tensor | None) -> None:
        counted["parts"] += 1
        if tensor is not None and not is_lazy(tensor):
            counted[kind] += tensor.numel()
        if any(counted[kind] > limit for kind, limit in most._asdict().items()):
            raise ValueError(f"it has more than {most}")

    def part(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            count("parts", None)

    def weight(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if threading.get_ident() != thread:
            return None
        count("weights", parameter)
        return None if parameter is None else changed(parameter)

    def buffer(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
        if threading.get_ident() == thread:
            count("buffers", tensor)

    handles = (
        register_module_module_registration_hook(part),
        register_module_parameter_registration_hook(weight),
        register_module_buffer_registration_hook(buffer),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
