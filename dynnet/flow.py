"""Rows leaving a running forward.

Hooks stand on the backbone's modules and do nothing until a `Flow` is running: an object made for one call, which sees
the output of every boundary and decides what goes on. What a call knows lives in its flow, never on a module, so models
can be copied, shared between threads, and left in the middle of a forward.

    B rows of the batch at the start, b rows still in it
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dynnet.exits import Boundary, Companion

_running: ContextVar[Flow | None] = ContextVar("dynnet_flow", default=None)


class Finished(Exception):
    """All rows have left: the rest of the backbone has nothing to do. Never seen outside `run`."""


class Tag:
    """The identity of one wrapped model; copied together with it, so a copy listens to its own flows only."""


class Flow:
    """One call of one wrapped model.

    Attributes:
        rows: (b,) int64, the original rows that are still running; None while all are.
    """

    def __init__(self, tag: Tag) -> None:
        self.tag = tag
        self.rows: Tensor | None = None
        # For a tensor made when n rows were running: which of its rows are still there. Sizes only ever shrink, so n
        # tells the time.
        self._survivors: dict[int, Tensor] = {}

    def reach(self, index: int, output: Any, leaves: Sequence[int]) -> Any:
        """Called with the output of boundary `index`; returns what goes on, None to leave it untouched."""
        raise NotImplementedError

    def thin_out(self, output: Any, leaves: Sequence[int], kept: Tensor) -> Any:
        """Take rows out of the batch.

        Args:
            output: of a boundary, any nesting of tensors.
            leaves: positions of the batch's tensors in it.
            kept: (b',) int64, the rows of `output` that stay.
        """
        flat, spec = tree_flatten(output)
        before = _tensors(flat)[leaves[0]].shape[0]
        self._survivors = {n: rows[kept] for n, rows in self._survivors.items()}
        self._survivors[before] = kept
        self.rows = kept if self.rows is None else self.rows[kept]
        return tree_unflatten(_replace(flat, {i: _take(_tensors(flat)[i], kept, 0) for i in leaves}), spec)

    def catch_up(self, args: Any, leaves: Sequence[tuple[int, int]]) -> Any:
        """Take the rows that have left out of tensors made earlier; None if there are none."""
        flat, spec = tree_flatten(args)
        tensors = _tensors(flat)
        late = {
            i: _take(tensors[i], self._survivors[tensors[i].shape[dim]], dim)
            for i, dim in leaves
            if tensors[i].shape[dim] in self._survivors
        }
        return tree_unflatten(_replace(flat, late), spec) if late else None


@contextlib.contextmanager
def run(flow: Flow) -> Iterator[None]:
    """Let the hooks of the flow's model listen to it; ends early and quietly once all rows have left."""
    token = _running.set(flow)
    try:
        with contextlib.suppress(Finished):
            yield
    finally:
        _running.reset(token)


@dataclass(eq=False)
class ExitHook:
    """Forward hook of a boundary."""

    tag: Tag
    index: int
    leaves: tuple[int, ...]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        flow = _running.get()
        return flow.reach(self.index, output, self.leaves) if flow is not None and flow.tag is self.tag else None


@dataclass(eq=False)
class CompanionHook:
    """Forward pre-hook of a module that receives tensors older than the last exit."""

    tag: Tag
    leaves: tuple[tuple[int, int], ...]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        flow = _running.get()
        if flow is None or flow.tag is not self.tag or flow.rows is None:
            return None
        return flow.catch_up((args, kwargs), self.leaves)


def attach(backbone: nn.Module, tag: Tag, boundaries: Sequence[Boundary], companions: Sequence[Companion]) -> None:
    """Put the hooks on a backbone; `detach` takes them away."""
    for index, boundary in enumerate(boundaries):
        hook = ExitHook(tag, index, boundary.leaves)
        backbone.get_submodule(boundary.name).register_forward_hook(hook)
    for companion in companions:
        module = backbone.get_submodule(companion.name)
        module.register_forward_pre_hook(CompanionHook(tag, companion.leaves), with_kwargs=True)


def detach(backbone: nn.Module) -> None:
    """Remove every hook of dynnet's from a backbone."""
    for module in backbone.modules():
        for hooks, options in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if isinstance(hook, (ExitHook, CompanionHook))]:
                del hooks[key]
                options.pop(key, None)


def is_attached(backbone: nn.Module) -> bool:
    return any(isinstance(h, ExitHook) for m in backbone.modules() for h in m._forward_hooks.values())


def features(output: Any) -> list[Tensor]:
    """The tensors of a boundary's output, in the order in which `Feature.leaf` counts them."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _tensors(flat: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in flat if isinstance(leaf, Tensor)]


def _replace(flat: Sequence[Any], new: dict[int, Tensor]) -> list[Any]:
    """`flat` with some of its tensors replaced, counted among the tensors only."""
    positions = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    result = list(flat)
    for i, tensor in new.items():
        result[positions[i]] = tensor
    return result


def _take(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    # Indexing keeps channels_last, where index_select would make a contiguous NCHW copy.
    return x[rows] if dim == 0 else torch.index_select(x, dim, rows)
