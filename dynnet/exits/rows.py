"""Rows of a batch that leave one after the other: who is still here, who left where, in what order answers go back.

No hooks, no modules; rows are numpy's or torch's integers, whichever they are given as. Who leaves is decided row by
row, on its own confidence: what its neighbours do has no say in it.

    >>> import numpy as np
    >>> rows = Rows(4)
    >>> gone, kept = rows.leave(0, leaves(np.array([0.2, 0.9, 0.4, 0.8]), 0.75))  # two leave at exit 0 ...
    >>> gone, kept, rows.here
    (array([1, 3]), array([0, 2]), array([0, 2]))
    >>> rows.finish(1)  # ... and two at the end
    >>> answers = [np.array([10, 30]), np.array([0, 20])]  # of those that left, in the order in which they left
    >>> rows.in_order(answers)
    array([ 0, 10, 20, 30])
    >>> rows.exits()
    [(0, array([1, 3])), (1, array([0, 2]))]

    B rows at the beginning, b of them still here
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def leaves(confidence: Any, threshold: float) -> Any:
    """Which samples answer at an exit.

    Args:
        confidence: (B,) of torch or numpy, or one number; NaN never leaves.
        threshold: leave where confidence >= threshold; inf never, -inf always.

    Returns:
        (B,) bool, or one bool.
    """
    # NaN >= -inf is False in IEEE 754, so a broken head can never answer.
    if isinstance(confidence, (int, float)):
        return confidence >= threshold
    # In float64, where thresholds were fitted: in float32 one just above the largest confidence would be rounded to it.
    if isinstance(confidence, np.ndarray):
        return confidence.astype(np.float64, copy=False) >= threshold
    return confidence.double() >= threshold


def route(confidences: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """(B,) int64: the exit at which each row leaves, where all exits have been asked about all rows.

    Args:
        confidences: (B, E) or more columns, of which the first E count.
        thresholds: E; who leaves at none of the exits leaves at number E.
    """
    taken = np.full(len(confidences), len(thresholds))
    for exit in reversed(range(len(thresholds))):
        taken[leaves(confidences[:, exit], thresholds[exit])] = exit
    return taken


class Rows:
    """The rows of one batch while some of them leave.

    Attributes:
        here: (b,) the original rows that are still here; None while all are.
        size: b.
    """

    def __init__(self, size: int) -> None:
        self.here: Any = None
        self.size = size
        self._left: list[tuple[int, Any]] = []
        # For a tensor made when n rows were here: which of its rows still are. Rows only ever get fewer, so n tells the
        # time.
        self._survivors: dict[int, Any] = {}

    def leave(self, exit: int, leaving: Any) -> tuple[Any, Any]:
        """Some rows leave.

        Args:
            exit: its number.
            leaving: (b,) bool, not all true: `finish` is for the last ones.

        Returns:
            Which of the b rows go, and which stay, rising.
        """
        gone, kept = _where(leaving), _where(~leaving)
        self.part(exit, gone, kept)
        return gone, kept

    def part(self, exit: int, gone: Any, kept: Any) -> None:
        """As `leave`, for who knows the places of those that go and of those that stay."""
        self._left.append((exit, gone if self.here is None else self.here[gone]))
        self._survivors = {size: rows[kept] for size, rows in self._survivors.items()}
        self._survivors[self.size] = kept
        self.here = kept if self.here is None else self.here[kept]
        self.size = len(kept)

    def finish(self, exit: int) -> None:
        """All that are still here leave."""
        self._left.append((exit, self.here))

    def since(self, size: int) -> Any:
        """Of a tensor made when `size` rows were here, the rows that still are; None where none has left since."""
        return self._survivors.get(size)

    def exits(self) -> list[tuple[int, Any]]:
        """(exit, original rows) of each group that left, in the order of leaving; None for all rows."""
        return self._left

    def in_order(self, parts: Sequence[Any]) -> Any:
        """What the groups that left were given, (n, ...) each, put back into the order of the batch: (B, ...)."""
        if len(parts) == 1:
            return parts[0]
        rows = [rows for _, rows in self._left]
        if isinstance(parts[0], np.ndarray):
            joined = np.concatenate(parts)
            back = np.empty_like(joined)
            back[np.concatenate(rows)] = joined
            return back
        import torch  # a runner of exported stages has none

        whole = torch.cat(list(parts))
        return torch.empty_like(whole).index_copy(0, torch.cat(rows), whole)


def _where(mask: Any) -> Any:
    return np.flatnonzero(mask) if isinstance(mask, np.ndarray) else mask.nonzero().squeeze(1)
