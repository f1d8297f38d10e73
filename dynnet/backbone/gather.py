"""Copying some entries of a tensor."""

from __future__ import annotations

import functools

from torch import Tensor


def pick(x: Tensor, dim: int, index: Tensor, size: int = 1) -> Tensor:
    """Some blocks of neighbours along one dimension; the memory layout stays.

    `index_select` on a tensor whose dimensions do not lie in memory in their order (channels_last) makes a contiguous
    copy in another layout, entry by entry. In their order, whole runs are copied.

    Args:
        x: any tensor.
        dim: the dimension.
        index: (k,) int64, numbers of the blocks.
        size: entries of a block; divides the dimension.

    Returns:
        As x, with k * size entries along `dim`.
    """
    order, place, back = _layout(x.stride(), dim)
    laid = x if order is None else x.permute(order)
    before, after = laid.shape[:place], laid.shape[place + 1 :]
    if size > 1:
        laid = laid.view(*before, -1, size, *after)
    taken = laid.index_select(place, index)
    if size > 1:
        taken = taken.view(*before, -1, *after)
    return taken if back is None else taken.permute(back)


@functools.lru_cache(maxsize=1024)
def _layout(strides: tuple[int, ...], dim: int) -> tuple[tuple[int, ...] | None, int, tuple[int, ...] | None]:
    """The dimensions in the order in which they lie in memory, the place of `dim` among them, and the way back; None
    for both where they lie in order."""
    dims = tuple(range(len(strides)))
    order = tuple(sorted(dims, key=lambda d: strides[d], reverse=True))
    if order == dims:
        return None, dim, None
    return order, order.index(dim), tuple(order.index(d) for d in dims)
