"""Numbers that somebody wrote down, within their range or refused in words."""

from __future__ import annotations

import math
import numbers
from typing import Any

from dynnet.errors import DynnetError, RecipeError


def check_range(
    value: Any,
    what: str,
    low: float,
    high: float,
    *,
    whole: bool = False,
    open_low: bool = False,
    error: type[DynnetError] = RecipeError,
) -> None:
    """Refuse what is no finite number from `low` to `high`: NaN, infinity, truth values and text as well.

    Args:
        value: what was written down.
        what: its name, for the message: "data.workers".
        low, high: both allowed themselves; -inf and inf for no limit on that side.
        whole: only whole numbers, of an integer type.
        open_low: `low` itself is refused too.
        error: what is raised.

    Raises:
        DynnetError: `error`, with what was got and what is allowed.
    """
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, bool) and isinstance(value, kind):
        number: Any = value  # compared as it is: a large whole number need not fit a float
        if abs(number) != math.inf and low <= number <= high and not (open_low and number == low):
            return
    raise error(f"{what} is {value!r}; give a {'whole' if whole else 'finite'} number{_range(low, high, open_low)}")


def _range(low: float, high: float, open_low: bool) -> str:
    """In words, with a leading space; "" without limits."""
    below = f"{'above' if open_low else 'at least'} {low:g}" if low != -math.inf else ""
    above = f"at most {high:g}" if high != math.inf else ""
    return f" {' and '.join(filter(None, (below, above)))}" if below or above else ""
