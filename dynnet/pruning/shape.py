"""What pruning has made of a model's shape: widths of layers, blocks that are gone. Enough to make it again.

A pruned model differs from the one that timm builds in nothing else, so its file needs no code: build, bring into
shape, load weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynnet.backbone.dry_run import BATCH, trace
from dynnet.backbone.layers.table import cut_, effect_of, stated_widths
from dynnet.backbone.names import is_inside, put_
from dynnet.backbone.subsets import Subset, subset
from dynnet.channels.labels import HEADS, TOGETHER
from dynnet.errors import PruneError

_FEATURES = ("in_features", "num_features", "head_hidden_size")  # what timm's models say of their widths


@dataclass(frozen=True)
class Shape:
    """How a model differs from a fresh one; by default not at all.

    Attributes:
        removed: names of modules that pass on what they are given.
        widths: (made, read) channels of layers that are narrower, and the same two of the fresh model, by layer.
        stated: what other modules say of widths, by module and attribute.
        features: widths in `feature_info`.
    """

    removed: tuple[str, ...] = ()
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stated: dict[str, dict[str, int]] = field(default_factory=dict)
    features: tuple[int, ...] = ()


def shape_of(model: nn.Module, fresh: nn.Module) -> Shape:
    """How a model differs from a fresh one.

    Args:
        model: pruned, or not.
        fresh: as timm builds it; may be on the meta device.
    """
    modules = dict(model.named_modules())
    removed = tuple(name for name, module in fresh.named_modules() if isinstance(modules.get(name), Skipped))
    widths = {
        name: (*now, *(stated_widths(module) or ()))
        for name, module in fresh.named_modules()
        if effect_of(module) and name in modules
        if (now := stated_widths(modules[name])) and now != stated_widths(module)
    }
    stated = {
        name: {
            key: vars(modules[name])[key] for key in _stated(module) if vars(modules[name])[key] != vars(module)[key]
        }
        for name, module in fresh.named_modules()
        if name in modules and type(modules[name]) is type(module)
    }
    features = _features(model)
    narrower = {name: values for name, values in stated.items() if values}
    return Shape(removed, widths, narrower, features if features != _features(fresh) else ())


def bring_into_shape_(model: nn.Module, shape: Shape) -> None:
    """Make a fresh model as narrow and as short as another one was, in place; which channels stay means nothing.

    Raises:
        PruneError: the model has no such layers, or of other widths than the one had that was pruned.
    """
    modules = dict(model.named_modules())
    unknown = sorted((set(shape.removed) | set(shape.widths) | set(shape.stated)) - set(modules))
    if unknown:
        raise PruneError(f"it has no {unknown[0]!r}, which was pruned")
    for name in shape.removed:
        if name == "" or is_inside(name, [other for other in shape.removed if other != name]):
            raise PruneError(f"{name!r} cannot be left out by itself")
        remove_(model, name)
    for name, widths in shape.widths.items():
        _cut_as_stated_(name, modules[name], widths)
    for name, values in shape.stated.items():
        _restate_as_stated_(name, modules[name], values)
    for entry, width in zip(getattr(model, "feature_info", None) or (), shape.features, strict=False):
        if not isinstance(entry, dict) or not 0 <= width <= entry.get("num_chs", 0):
            raise PruneError(f"a feature of {width} channels is none of its own: {entry}")
        entry["num_chs"] = width


def _cut_as_stated_(name: str, layer: nn.Module, widths: tuple[int, ...]) -> None:
    wide = stated_widths(layer) if effect_of(layer) else None
    if wide is None:
        raise PruneError(f"its {name!r} is a {type(layer).__name__}, which has no width")
    now, before = widths[:2], widths[2:]
    if len(now) < 2 or wide not in (now, before) or not all(0 < n <= w for n, w in zip(now, wide, strict=True)):
        raise PruneError(
            f"its {name!r} makes and reads {list(wide)} channels, not {list(before)} or, pruned, {list(now)}"
        )
    try:
        cut_(layer, _first(now[1], wide[1]), _first(now[0], wide[0]))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise PruneError(f"its {name!r} cannot make and read {list(now)} of {list(wide)} channels") from error


def _restate_as_stated_(name: str, module: nn.Module, values: dict[str, int]) -> None:
    """Only what pruning sets, and only to less: nothing else of a module is for a file to say."""
    for key, value in values.items():
        if key not in _stated(module) or not 0 < value <= vars(module)[key]:
            raise PruneError(f"its {name!r} states no {key!r} of {value} channels or more")
        setattr(module, key, value)


class Skipped(nn.Module):
    """What stands in for a module that is gone: it passes on the first of what it is given."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return x


def remove_(model: nn.Module, name: str) -> None:
    """Let a module pass on what it is given, in place."""
    put_(model, name, Skipped().train(model.get_submodule(name).training))


def restate_(model: nn.Module, before: nn.Module, size: tuple[int, ...]) -> None:
    """Set right what a timm model says of its own widths: `feature_info`, `num_features`, `head_hidden_size`.

    Args:
        model: the narrower one.
        before: as it was.
        size: (C, H, W) of the images.
    """
    _restate_features(model, before, size)
    _restate_output(model, before, size)
    _restate_head(model, before)


def _restate_features(model: nn.Module, before: nn.Module, size: tuple[int, ...]) -> None:
    wide, thin = _outputs(before, size), _outputs(model, size)
    for entry in getattr(model, "feature_info", None) or ():
        if isinstance(entry, dict) and entry.get("module") in thin and "num_chs" in entry:
            entry["num_chs"] = _now(entry["num_chs"], wide[entry["module"]], thin[entry["module"]])


def _restate_output(model: nn.Module, before: nn.Module, size: tuple[int, ...]) -> None:
    """The model's own `num_features`: the width of what `forward_features` gives."""
    if not hasattr(model, "num_features") or not hasattr(model, "forward_features"):
        return
    outputs = [
        trace(m, size, BATCH, lambda twin, x: cast(Any, twin).forward_features(x)).output for m in (before, model)
    ]
    if all(outputs):
        width = cast(Any, before).num_features
        cast(Any, model).num_features = _now(width, outputs[0][0].shape, outputs[1][0].shape)


def _restate_head(model: nn.Module, before: nn.Module) -> None:
    """Whatever else says what the classifier reads."""
    was, head = (m.get_classifier() if hasattr(m, "get_classifier") else None for m in cast(Any, (before, model)))
    if not isinstance(was, nn.Linear) or not isinstance(head, nn.Linear):
        return
    for module in model.modules():
        for key in _FEATURES:
            known = effect_of(module) or (module is model and key == "num_features")
            if not known and vars(module).get(key) == was.in_features:
                setattr(module, key, head.in_features)


def _stated(module: nn.Module) -> list[str]:
    """What a module says of its widths that is no layer itself."""
    keys = (*_FEATURES, *HEADS, *TOGETHER)
    return [] if effect_of(module) else [key for key in keys if isinstance(vars(module).get(key), int)]


def _features(model: nn.Module) -> tuple[int, ...]:
    info = getattr(model, "feature_info", None)
    return tuple(entry.get("num_chs", 0) for entry in info) if isinstance(info, list) else ()


def _first(kept: int, width: int) -> Subset | None:
    return None if kept == width else subset(torch.arange(kept), width)


def _outputs(model: nn.Module, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of what modules give."""
    return {call.name: call.leaves[0].shape for call in trace(model, size, BATCH).calls if call.leaves}


def _now(width: int, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """What has become of the dimension that had this size."""
    changed = [b for a, b in zip(before, after, strict=True) if a == width and b != width]
    return changed[0] if changed else width
