"""What timm's tools ask of a model, answered for a module that has the model inside, as `backbone`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from dynnet.errors import UnsupportedError

_ANSWERED = (
    "pretrained_cfg", "default_cfg", "num_features", "head_hidden_size", "feature_info", "get_classifier",
    "set_grad_checkpointing",
)  # fmt: skip
_REFUSED = {
    "reset_classifier": "exits have classifiers of their own; call it on the backbone, before wrap",
    "forward_features": "a sample may have left before they are computed; call unwrap(), and ask the backbone",
    "forward_head": "a sample may have left before it runs; call unwrap(), and ask the backbone",
    "forward_intermediates": "a sample may have left before they are computed; call unwrap(), and ask the backbone",
    "get_intermediate_layers": "a sample may have left before they are computed; call unwrap(), and ask the backbone",
    "prune_intermediate_layers": "exits stand on layers that would go; call it on the backbone, before wrap",
}


@dataclass(frozen=True)
class Preparation:
    """What of timm's `pretrained_cfg` says how images are prepared, and what the classes are called."""

    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    label_names: tuple[str, ...] | None = None

    def known(self) -> dict[str, Any]:
        """What it says, without what it leaves open."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def preparation_of(model: nn.Module) -> dict[str, Any]:
    """How a model's images are prepared and its classes are called, as far as its `pretrained_cfg` says."""
    config = getattr(model, "pretrained_cfg", None) or {}
    said = {field.name: config[field.name] for field in fields(Preparation) if config.get(field.name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


def prepare_(model: nn.Module, preparation: dict[str, Any]) -> None:
    """Let a plain model say how its images are prepared, in its `pretrained_cfg`, where timm's tools look for it."""
    held: Any = model
    config = {**(getattr(model, "pretrained_cfg", None) or {}), **preparation}
    held.pretrained_cfg = held.default_cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


class Hosted(nn.Module):
    """A module that answers for the `backbone` inside it, whatever that can be asked.

    Attributes:
        backbone: timm's model, or another.
        pretrained_cfg, default_cfg, num_features, head_hidden_size, feature_info, get_classifier,
            set_grad_checkpointing: the backbone's.
        group_matcher: groups of parameters by depth, as timm's layer-wise learning rates ask for; what is not the
            backbone's comes last, with its classifier.
    """

    backbone: nn.Module

    def __getattr__(self, name: str) -> Any:
        if name in _ANSWERED:
            return getattr(self.backbone, name)
        if name == "group_matcher":
            return _matcher_of(self.backbone.group_matcher)
        if name in _REFUSED and hasattr(self.backbone, name):
            return _refusal(name)
        return super().__getattr__(name)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers are to spare: position embeddings and the like."""
        spared = getattr(self.backbone, "no_weight_decay", None)
        return {f"backbone.{name}" for name in spared()} if callable(spared) else set()


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"a wrapped model has no {name}(): {_REFUSED[name]}")

    return refuse


def _matcher_of(backbones: Any) -> Callable[..., Any]:
    def matcher(coarse: bool = False) -> Any:
        found = backbones(coarse=coarse)
        if not callable(found):
            return {name: _inside(spec) for name, spec in found.items()}

        def group(name: str) -> Any:
            ours = not name.startswith("backbone.")
            return (float("inf"),) if ours else found(name.removeprefix("backbone."))

        return group

    return matcher


def _inside(spec: Any) -> Any:
    """A pattern of parameter names, or several with their orders, for names that begin with "backbone."."""
    if isinstance(spec, (list, tuple)):
        return [(_inside(pattern), order) for pattern, order in spec]
    if spec is None:
        return None
    anchored = re.sub(r"(^|[|(])\^", r"\1", spec)  # `re.match` anchors the whole
    return rf"backbone\.(?:{anchored})"
