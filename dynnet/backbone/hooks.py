"""Hooks on somebody's modules, for as long as something lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def watching(
    modules: Mapping[str, nn.Module], enter: Callable[[str], Any], leave: Callable[[str], Any]
) -> Iterator[None]:
    """Hooks on modules, by name, for as long as this lasts.

    Args:
        modules: by name.
        enter: makes the hook (module, args, kwargs) that runs before a module's own ones.
        leave: makes the hook (module, args, output) that runs after them.
    """
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def reading(layers: Mapping[str, nn.Module], look: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Show `look` the name and the input of each of these layers as it runs, for as long as this lasts; what it returns
    is read in the input's place."""

    def hook(name: str) -> Any:
        def show(module: nn.Module, args: Any) -> Any:
            x = look(name, args[0])
            return None if x is None else (x, *args[1:])

        return show

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(hook(name)))
        yield
