"""Ranges of numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dynnet.errors import DataError, RecipeError
from dynnet.learning.ranges import check_range


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_numbers_in_range_pass(value: Any) -> None:
    check_range(value, "loss.distill", 0, 1)
    check_range(10**400, "seed", 0, math.inf, whole=True)
    check_range(-1e300, "x", -math.inf, math.inf)


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, math.nan, math.inf, -math.inf, True, False, "0.5", None, [0.5], 1j, np.bool_(True)]
)
def test_all_else_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match="loss.distill is .*; give a finite number at least 0 and at most 1$"):
        check_range(value, "loss.distill", 0, 1)
    with pytest.raises(RecipeError, match="loss.distill is"):
        check_range(value if value != 1.1 else math.inf, "loss.distill", 0, math.inf)


def test_whole_numbers_open_ends_and_other_errors() -> None:
    with pytest.raises(DataError, match="data.workers is 2.0; give a whole number at least 0$"):
        check_range(2.0, "data.workers", 0, math.inf, whole=True, error=DataError)
    with pytest.raises(RecipeError, match="ema is 0; give a finite number above 0 and at most 1$"):
        check_range(0, "ema", 0, 1, open_low=True)
    with pytest.raises(RecipeError, match="x is nan; give a finite number$"):
        check_range(math.nan, "x", -math.inf, math.inf)
