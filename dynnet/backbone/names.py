"""Names of models and modules, as users give and read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from dynnet.errors import DynnetError, did_you_mean


def title(model: nn.Module) -> str:
    """What a plain model is called in a message: timm's name, else its class."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def put_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let a module stand wherever the one of this name stands, in place: it may have other names as well."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                setattr(parent, key, module)


def is_inside(name: str, parents: Sequence[str]) -> bool:
    """Is it one of these modules, or a module within one?"""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def check_list(key: str, names: Sequence[str], error: type[DynnetError]) -> None:
    """Refuse one name where several are expected: its letters would be taken for them.

    Raises:
        error: with the key that was given it.
    """
    if isinstance(names, str):
        raise error(f"{key}={names!r}: give a list of module names, such as [{names!r}]")


def check_excluded(exclude: Sequence[str], modules: Collection[str], model: str, error: type[DynnetError]) -> None:
    """Refuse modules to be excluded that there are not.

    Raises:
        error: no list; or with the name, and the nearest that there is.
    """
    check_list("exclude", exclude, error)
    for name in exclude:
        if name not in modules:
            raise error(f"exclude: {model} has no module {name!r}{did_you_mean(name, modules)}")


def check_fields(
    given: Mapping[str, Any], config: type, verb: str, error: type[DynnetError], others: Sequence[str] = ()
) -> None:
    """Refuse arguments that are no fields of a verb's configuration.

    Args:
        others: that the verb takes besides, for the message.

    Raises:
        error: with the nearest that there is.
    """
    known = [*(field.name for field in dataclasses.fields(config)), *others]
    for name in given:
        if name not in known:
            raise error(f"{verb} has no {name!r}{did_you_mean(name, known)}; it takes {', '.join(known)}")
