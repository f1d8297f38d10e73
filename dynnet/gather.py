"""Copying some entries of a tensor."""

from __future__ import annotations

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
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    place = order.index(dim)
    laid = x.permute(order)
    if size > 1:
        laid = laid.unflatten(place, (-1, size))
    taken = laid.index_select(place, index)
    if size > 1:
        taken = taken.flatten(place, place + 1)
    return taken.permute([order.index(d) for d in range(x.ndim)])
