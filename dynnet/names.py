"""Names of modules, as users give them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dynnet.errors import DynnetError, did_you_mean


def is_inside(name: str, parents: Sequence[str]) -> bool:
    """Is it one of these modules, or a module within one?"""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def check_excluded(exclude: Sequence[str], modules: Collection[str], title: str, error: type[DynnetError]) -> None:
    """Refuse modules to be excluded that there are not.

    Raises:
        error: with the name, and the nearest that there is.
    """
    for name in exclude:
        if name not in modules:
            raise error(f"exclude: {title} has no module {name!r}{did_you_mean(name, modules)}")
