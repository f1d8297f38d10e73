"""What `timm.create_model` makes, beside a model that is to be saved: a file says how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn

from dynnet.backbone.names import is_inside
from dynnet.deploy.folding import FoldedNorm
from dynnet.deploy.int8 import Int8Layer
from dynnet.errors import PruneError
from dynnet.pruning.shape import UNCHANGED, Shape, Skipped, bring_into_shape_, shape_of

# What modules of one class may differ in, though their tensors do not, so that their answers differ.
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "eps", "negative_slope", "approximate")


def difference(model: nn.Module, fresh: nn.Module, shape: Shape) -> str | None:
    """Where a model is not the pruned, folded or int8 form of a fresh one, in words; None where it is.

    Args:
        model: to be saved.
        fresh: as timm makes it, without numbers; it is not fresh afterwards.
        shape: of the model beside it.
    """
    return _difference(model, fresh) or _misfit(model, fresh, shape)


def pruned_shape(backbone: nn.Module, create: Mapping[str, Any]) -> Shape:
    """How a backbone differs from the one that timm builds; not at all where timm cannot tell."""
    fresh = fresh_of(create)
    return UNCHANGED if fresh is None else shape_of(backbone, fresh)


def fresh_of(create: Mapping[str, Any]) -> nn.Module | None:
    """What timm builds, without numbers."""
    try:
        with torch.device("meta"):
            return timm.create_model(**create)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def _difference(model: nn.Module, fresh: nn.Module) -> str | None:
    """Where a model is of other parts than a fresh one, in words; None where it is only pruned, folded, in int8, or
    trained with other dropout."""
    mine, theirs = (dict(m.named_modules()) for m in (model, fresh))
    replaced = [name for name, module in mine.items() if isinstance(module, (Skipped, FoldedNorm, Int8Layer))]
    for name in [*theirs, *(name for name in mine if name not in theirs)]:
        if is_inside(name, replaced):
            continue
        kinds = [_kind(modules[name]) if name in modules else None for modules in (mine, theirs)]
        if kinds[0] is not kinds[1]:
            told = ["nothing" if kind is None else f"a {kind.__name__}" for kind in kinds]
            return f"{name!r} is {told[0]}, there {told[1]}"
        for key in _SETTINGS:
            values = [getattr(modules[name], key, None) for modules in (mine, theirs)]
            if values[0] != values[1]:
                return f"{name!r} has {key}={values[0]}, there {values[1]}"
    return None


def _misfit(model: nn.Module, fresh: nn.Module, shape: Shape) -> str | None:
    """Why a fresh model cannot be brought into the shape of another, in words; None where it can. It is not fresh
    afterwards."""
    try:
        bring_into_shape_(fresh, shape)
    except PruneError as error:
        return str(error)
    mine, theirs = model.state_dict(), fresh.state_dict()
    for name in (name for name in mine if name in theirs):
        if mine[name].shape != theirs[name].shape:
            return f"{name!r} has shape {tuple(mine[name].shape)}, there {tuple(theirs[name].shape)}"
    return None


def timm_name(backbone: nn.Module) -> str | None:
    """With the tag of its pretrained weights, on which input size and normalisation depend, where timm knows it."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    name, tag = config.get("architecture"), config.get("tag")
    tagged = f"{name}.{tag}"
    return tagged if tag and timm.is_model_pretrained(tagged) else name


def _kind(module: nn.Module) -> type:
    """Its class; nothing happens in eval mode in any form of dropout."""
    return nn.Identity if isinstance(module, (nn.modules.dropout._DropoutNd, DropPath)) else type(module)
