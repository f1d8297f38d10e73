"""What a dynamic model saved, in multiply-adds and in time: figures of timed calls, and words for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynnet.evaluation.timing import Latency

WORTH_DIVIDING = 0.05  # of the MACs; below, their ratio to the time saved is noise


def savings(timed: Latency, bill: Sequence[int], dense_macs: int) -> dict[str, Any]:
    """Shares of MACs and of time that were saved on the timed images.

    Args:
        timed: a dynamic model against its dense one.
        bill: E + 1 prices, in MACs, of a sample that leaves at each exit.
        dense_macs: of the dense model.

    Returns:
        "macs_saved", "time_saved", and "time_by_macs", their ratio; None where too few MACs were saved to tell.
    """
    macs, time = 1 - float(np.asarray(bill)[timed.exits].mean()) / dense_macs, _time_saved(timed)
    return {"macs_saved": macs, "time_saved": time, "time_by_macs": time / macs if macs > WORTH_DIVIDING else None}


def _time_saved(timed: Latency) -> float:
    ratio = timed.dynamic_ms / timed.dense_ms
    return 1 - (float(np.median(ratio)) if timed.batch_size > 1 else typical(ratio, timed.exits[:, 0]))


def typical(values: np.ndarray, taken: np.ndarray) -> float:
    """Medians by exit taken, weighed by how many took it.

    Args:
        values: (N,) of single images.
        taken: (N,) the exit of each.
    """
    return float(sum((taken == exit).mean() * np.median(values[taken == exit]) for exit in np.unique(taken)))


def in_words(saved: dict[str, Any]) -> str:
    """What `savings` gave, in a line."""
    ratio = "" if saved["time_by_macs"] is None else f", {saved['time_by_macs']:.2f} of the MACs saved"
    return f"MACs saved {saved['macs_saved']:+.1%}, time saved {saved['time_saved']:+.1%}{ratio}"


def percentiles(timed: Latency, dense: str = "bare") -> str:
    """Milliseconds of both models, in a line."""
    parts = []
    for which in (50, 90, 99):
        theirs, ours = timed.percentile(which)
        parts.append(f"p{which} {ours:.2f} ms ({dense} {theirs:.2f})")
    return ", ".join(parts)
