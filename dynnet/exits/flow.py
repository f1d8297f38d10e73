"""Rows leaving a running forward.

Hooks stand on the backbone's modules and do nothing until a `Flow` is running: an object made for one call, which sees
the output of every boundary and decides what goes on. What a call knows lives in its flow, never on a module, so models
can be copied, shared between threads, and left in the middle of a forward.

Who is still here is told by `rows.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dynnet.backbone.gather import pick
from dynnet.errors import InputError
from dynnet.exits.boundaries import Boundary, Companion
from dynnet.exits.noted_sizes import NotedSizes
from dynnet.exits.rows import Rows

_running: ContextVar[Flow | None] = ContextVar("dynnet_flow", default=None)


class Finished(Exception):  # noqa: N818 (no error)
    """All rows have left: the rest of the backbone has nothing to do. Never seen outside `run`."""


class Tag:
    """The identity of one wrapped model; copied together with it, so a copy listens to its own flows only."""


class Gating(Protocol):
    """Runs layers in place of their own forward; see `dynnet.gates.decisions.Decisions`."""

    def apply(self, site: Any, layer: nn.Module, x: Tensor, rows: Rows) -> Tensor: ...

    def arrive(self, exit: int, output: Any, rows: Rows) -> None: ...


class Flow:
    """One call of one wrapped model.

    Attributes:
        image: (H, W) of its images.
        rows: who is still running.
        decisions: of the gates, by which layers run; None where nothing is gated.
        learns: may gradients be asked for?
        reached: boundaries, in the order in which the forward came to their ends.

    Args:
        tag: of the model.
        images: their shape (B, C, H, W).
        decisions: as above.
    """

    def __init__(self, tag: Tag, images: Sequence[int], decisions: Gating | None = None) -> None:
        self.tag = tag
        self.image = images[2], images[3]
        self.rows = Rows(images[0])
        self.decisions = decisions
        self.learns = torch.is_grad_enabled()
        self.reached: list[int] = []

    def reach(self, index: int, output: Any, leaves: Sequence[tuple[int, int]]) -> Any:
        """Called with the output of boundary `index`; returns what goes on, None to leave it untouched."""
        raise NotImplementedError

    def check_reached(self, exits: Sequence[str]) -> None:
        """Refuse a forward that has run to its end without coming to every boundary once.

        Raises:
            InputError: with the names of the others.
        """
        if len(self.reached) != len(exits) or len(set(self.reached)) != len(exits):
            others = [name for index, name in enumerate(exits) if self.reached.count(index) != 1]
            raise InputError(
                f"the forward did not run {others} exactly once, where exits stand: gradient checkpointing may run "
                f"what is inside of them piece by piece; let exits stand on single blocks, or switch it off with "
                f"set_grad_checkpointing(False)"
            )

    def catch_up(self, args: Any, leaves: Sequence[tuple[int, int, int]]) -> Any:
        """Take the rows that have left out of tensors made earlier; None if there are none.

        Args:
            args: any nesting of tensors.
            leaves: the batch's tensors in it, as (position, dimension of the batch, entries per sample).
        """
        flat, spec = tree_flatten(args)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        late = {}
        for i, dim, per_sample in leaves:
            rows = self.rows.since(tensors[i].shape[dim] // per_sample)
            if rows is not None:
                late[i] = take_rows(tensors[i], rows, dim, per_sample)
        return tree_unflatten(with_tensors(flat, late), spec) if late else None


def thinned(output: Any, leaves: Sequence[tuple[int, int]], kept: Tensor) -> Any:
    """The output of a boundary with only some of its rows.

    Args:
        output: any nesting of tensors.
        leaves: the batch's tensors in it, as (position, entries per sample).
        kept: (b',) int64, the rows that stay.
    """
    flat, spec = tree_flatten(output)
    tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    return tree_unflatten(with_tensors(flat, {i: take_rows(tensors[i], kept, 0, n) for i, n in leaves}), spec)


@contextlib.contextmanager
def run(flow: Flow, noted: NotedSizes | None = None) -> Iterator[None]:
    """Let the hooks of the flow's model listen to it; ends early and quietly once all rows have left.

    Args:
        flow: of one call.
        noted: corrects sizes of the batch that the backbone notes before an exit and reshapes with afterwards.
    """
    token = _running.set(flow)
    try:
        with contextlib.suppress(Finished), noted or contextlib.nullcontext():
            yield
    finally:
        _running.reset(token)


def image_size() -> tuple[int, int] | None:
    """(H, W) of the images of the call that is running, whosever it is; None outside of calls."""
    flow = _running.get()
    return None if flow is None else flow.image


def running(tag: Tag) -> Flow | None:
    """The call that is running, if it is one of the model with this tag."""
    flow = _running.get()
    return flow if flow is not None and flow.tag is tag else None


@dataclass(eq=False)
class ExitHook:
    """Forward hook of a boundary."""

    tag: Tag
    index: int
    leaves: tuple[tuple[int, int], ...]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        flow = running(self.tag)
        if flow is None:
            return None
        flow.reached.append(self.index)
        onward = flow.reach(self.index, output, self.leaves)
        if flow.decisions is not None:
            flow.decisions.arrive(self.index, output if onward is None else onward, flow.rows)
        return onward


@dataclass(eq=False)
class CompanionHook:
    """Forward pre-hook of a module that receives tensors older than the last exit."""

    tag: Tag
    leaves: tuple[tuple[int, int, int], ...]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        flow = running(self.tag)
        if flow is None or flow.rows.here is None:
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
    if isinstance(output, Tensor):
        return [output]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def with_tensors(flat: Sequence[Any], new: dict[int, Tensor]) -> list[Any]:
    """`flat` with some of its tensors replaced, counted among the tensors only."""
    positions = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    result = list(flat)
    for i, tensor in new.items():
        result[positions[i]] = tensor
    return result


def take_rows(x: Tensor, rows: Tensor, dim: int, per_sample: int) -> Tensor:
    """Some samples of a tensor.

    Args:
        x: any tensor.
        rows: (b,) int64, which.
        dim: its dimension of the batch.
        per_sample: entries of that, side by side, that belong to one sample.
    """
    if per_sample > 1:
        return take_rows(x.unflatten(dim, (-1, per_sample)), rows, dim, 1).flatten(dim, dim + 1)
    return pick(x, dim, rows)
