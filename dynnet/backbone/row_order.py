"""Where in a tensor the samples of a batch lie.

Windows, patches and heads are folded into the dimension of the batch: B samples of n entries are B * n rows. Mostly a
sample's rows are neighbours, (B n); folded the other way round, (n B), its rows lie B apart, and whoever takes the
first n rows for the first sample mixes samples up. Shapes cannot tell one from the other, so a dry run follows the
samples from operator to operator.

    B batch; a dimension of o * B * i entries repeats the whole batch o times, with i neighbours a sample
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Order(NamedTuple):
    """How samples lie in one tensor.

    Attributes:
        dim: the dimension that holds them.
        repeats: o, how often the whole batch is repeated along it; 1 where the rows of a sample are neighbours.
    """

    dim: int
    repeats: int


class Orders:
    """The orders of all tensors of a running forward.

    Args:
        batch: B; a number of which a dimension is a multiple only if the samples are in it.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._known: dict[int, Order | None] = {}
        self._held: list[Tensor] = []  # an identity may not be used twice

    def of(self, x: Tensor) -> Order | None:
        """None where a tensor has no samples, or nobody can tell how they lie."""
        if id(x) not in self._known:
            dim = self.dim(x)  # made elsewhere, the input say: of one sample after the other
            self._note(x, None if dim is None else Order(dim, 1))
        return self._known[id(x)]

    def dim(self, x: Tensor) -> int | None:
        """The first dimension that is a multiple of the batch."""
        return next((d for d, size in enumerate(x.shape) if size and size % self.batch == 0), None)

    def follow(self, packet: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note how samples lie in what an operator made."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and self.dim(x) is not None]
        for made in tree_leaves(output):
            if not isinstance(made, Tensor):
                continue
            known = self._known.get(id(made))
            if known is not None and (known.dim >= made.ndim or made.shape[known.dim] % self.batch):
                self._known[id(made)] = None  # an operator in place that has moved its dimensions
            elif (dim := self.dim(made)) is not None and id(made) not in self._known:
                # What only knows the batch's size (zeros, an expanded table) holds one sample after the other.
                self._note(made, self._made(packet, args, kwargs, given, made, dim) if given else Order(dim, 1))

    def _note(self, x: Tensor, order: Order | None) -> None:
        self._known[id(x)] = order
        self._held.append(x)

    def _made(
        self, packet: Any, args: Any, kwargs: Any, given: Sequence[Tensor], made: Tensor, dim: int
    ) -> Order | None:
        if packet in _RULES:
            return _RULES[packet](self, args, kwargs, made)
        for x in given:
            order = self.of(x)
            if order is not None and made.shape[dim] == x.shape[order.dim]:
                return Order(dim, order.repeats)
        return None


# What operators do that bring entries into another place. All others keep a dimension's entries in their order.


def _viewed(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    """All entries stay in a row; dimensions are cut anew."""
    x = args[0]
    order = orders.of(x)
    if order is None or x.numel() != made.numel():
        return None
    neighbours = x.shape[order.dim] // (order.repeats * orders.batch)
    apart = neighbours * math.prod(x.shape[order.dim + 1 :])  # entries from one sample to the next
    for dim, size in enumerate(made.shape):
        within = math.prod(made.shape[dim + 1 :])
        if within <= apart < within * size:
            whole = apart * orders.batch
            fits = apart % within == 0 and (within * size) % whole == 0
            return Order(dim, within * size // whole) if fits else None
    return None


def _permuted(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    x = args[0]
    order = orders.of(x)
    dims = [d % x.ndim for d in args[1]]
    return None if order is None else Order(dims.index(order.dim), order.repeats)


def _transposed(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    x = args[0]
    a, b = (d % x.ndim for d in (args[1:3] or (0, 1)))
    dims = list(range(x.ndim))
    dims[a], dims[b] = b, a
    return _permuted(orders, (x, dims), kwargs, made)


def _joined(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    """Side by side; along the dimension of the samples, one batch comes after the other."""
    along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % made.ndim
    parts = [x for x in args[0] if x.numel()]
    known = [(x, order) for x in parts if (order := orders.of(x)) is not None]
    if len({order.dim for _, order in known}) != 1:
        return None
    dim = known[0][1].dim
    if along != dim:
        return known[0][1] if len({order for _, order in known}) == 1 else None
    neighbours = {x.shape[dim] // (order.repeats * orders.batch) for x, order in known}
    whole = len(known) == len(parts) and len(neighbours) == 1
    return Order(dim, sum(order.repeats for _, order in known)) if whole else None


def _repeated(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    x, times = args[0], args[1]
    order = orders.of(x)
    if order is None:
        return None
    dim = order.dim + made.ndim - x.ndim
    return Order(dim, order.repeats * times[dim])


def _sliced(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    x, given = args[0], dict(enumerate(args))
    dim, start, step = given.get(1, 0), given.get(2) or 0, given.get(4, 1)
    order = orders.of(x)
    if order is None or dim % x.ndim != order.dim:
        return order
    whole = x.shape[order.dim] // order.repeats  # entries of one round of the batch
    fits = step == 1 and start % whole == 0 and made.shape[order.dim] % whole == 0
    return Order(order.dim, made.shape[order.dim] // whole) if fits else None


def _split(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    x, sizes = args[:2]
    order, dim = orders.of(x), args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if order is None or dim % x.ndim != order.dim:
        return order
    whole = x.shape[order.dim] // order.repeats
    fits = all(size % whole == 0 for size in ([sizes] if isinstance(sizes, int) else sizes))
    return Order(order.dim, made.shape[order.dim] // whole) if fits else None


def _shuffled(position: int) -> Rule:
    """Entries change places along the dimensions that stand at this position of the arguments."""

    def rule(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
        x, order = args[0], orders.of(args[0])
        dims = args[position] if len(args) > position else ()
        along = [dims] if isinstance(dims, int) else list(dims)
        return None if order is None or not along or order.dim in [d % x.ndim for d in along] else order

    return rule


def _indexed(orders: Orders, args: Any, kwargs: Any, made: Tensor) -> Order | None:
    """x[i, j, ...] with tensors of indices, None where a dimension is taken whole."""
    x, order = args[0], orders.of(args[0])
    if order is None or any(index is not None for index in args[1][order.dim : order.dim + 1]):
        return None
    dim = orders.dim(made)
    return None if dim is None or made.shape[dim] != x.shape[order.dim] else Order(dim, order.repeats)


Rule = Callable[[Orders, Any, Any, Tensor], Order | None]

_RULES: dict[Any, Rule] = {
    aten.view: _viewed,
    aten._unsafe_view: _viewed,
    aten.permute: _permuted,
    aten.transpose: _transposed,
    aten.t: _transposed,
    aten.cat: _joined,
    aten.repeat: _repeated,
    aten.slice: _sliced,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.flip: _shuffled(1),
    aten.roll: _shuffled(2),
    aten.index_select: _shuffled(1),
    aten.gather: _shuffled(1),
    aten.scatter: _shuffled(1),
    aten.sort: _shuffled(1),
    aten.index: _indexed,
}
