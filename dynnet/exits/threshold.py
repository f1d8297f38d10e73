"""Thresholds: what confidence is held against. Without torch: a runner of exported stages has none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from dynnet.errors import ThresholdError


def to_json(threshold: float) -> float | Literal["inf", "-inf"]:
    """A threshold for JSON, which has no infinity: inf and -inf become strings that float() reads back."""
    if abs(threshold) < math.inf:
        return threshold
    return "inf" if threshold > 0 else "-inf"


def check_thresholds(thresholds: Sequence[float], exits: Sequence[str]) -> tuple[float, ...]:
    """The thresholds as a tuple of floats.

    Raises:
        ThresholdError: not one number for each exit.
    """
    try:
        values = tuple(float(t) for t in thresholds)
    except (TypeError, ValueError):
        raise ThresholdError(
            f"thresholds={thresholds!r}: give a sequence of numbers, one for each of {list(exits)}"
        ) from None
    if len(values) != len(exits):
        raise ThresholdError(
            f"got {len(values)} thresholds for {len(exits)} exits {list(exits)}; "
            f"give one per exit, float('inf') where none should leave"
        )
    for value, name in zip(values, exits, strict=True):
        if math.isnan(value):
            raise ThresholdError(f"the threshold of exit {name!r} is NaN; give a number, inf or -inf")
    return values
