"""Models made ready for use: folded, in int8, and exported in stages that an engine runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynnet.deploy.runner import Runner

__all__ = ["Runner"]


def __getattr__(name: str) -> Any:
    if name == "Runner":  # not before it is asked for: the rest of this room needs no engine
        from dynnet.deploy.runner import Runner

        return Runner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
