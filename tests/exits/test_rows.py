"""Rows that leave: the idea by itself, with numpy and torch alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynnet.exits.rows import Rows, leaves, route

ARRAYS = {"numpy": np.asarray, "torch": lambda x: torch.from_numpy(np.asarray(x))}


def walk(confidences: np.ndarray, thresholds: list[float], array: Any) -> tuple[Rows, list[Any]]:
    """Rows that leave exit by exit, and what each group is given: ten times its rows' numbers, plus the exit."""
    rows, given_out = Rows(len(confidences)), []
    for exit, threshold in enumerate(thresholds):
        here = np.arange(len(confidences)) if rows.here is None else np.asarray(rows.here)
        leaving = leaves(array(confidences[here, exit]), threshold)
        if bool(leaving.all()):
            rows.finish(exit)
            return rows, [*given_out, array(10 * here + exit)]
        if bool(leaving.any()):
            gone, kept = rows.leave(exit, leaving)
            given_out.append(array(10 * here[np.asarray(gone)] + exit))
            assert rows.size == len(kept)
    here = np.arange(len(confidences)) if rows.here is None else np.asarray(rows.here)
    rows.finish(len(thresholds))
    return rows, [*given_out, array(10 * here + len(thresholds))]


@pytest.mark.parametrize("kind", ARRAYS)
@given(
    confidences=st.lists(st.lists(st.sampled_from([0.1, 0.5, 0.9, math.nan]), min_size=3, max_size=3), min_size=1),
    thresholds=st.lists(st.sampled_from([-math.inf, 0.3, 0.5, 0.9, math.inf]), min_size=3, max_size=3),
)
def test_answers_come_back_in_the_order_of_the_batch(
    kind: str, confidences: list[list[float]], thresholds: list[float]
) -> None:
    table = np.array(confidences)
    rows, answers = walk(table, thresholds, ARRAYS[kind])
    taken = route(table, thresholds)
    expected = 10 * np.arange(len(table)) + taken
    assert np.asarray(rows.in_order(answers)).tolist() == expected.tolist()
    assert [exit for exit, _ in rows.exits()] == sorted(set(taken.tolist()))


@pytest.mark.parametrize("kind", ARRAYS)
def test_what_was_made_earlier_loses_the_rows_that_have_left_since(kind: str) -> None:
    array, rows = ARRAYS[kind], Rows(6)
    rows.leave(0, array([True, False, False, False, True, False]))
    rows.leave(1, array([False, True, False, False]))
    assert np.asarray(rows.here).tolist() == [1, 3, 5]
    assert np.asarray(rows.since(6)).tolist() == [1, 3, 5]  # of a tensor that has all six
    assert np.asarray(rows.since(4)).tolist() == [0, 2, 3]  # of one that was made when four were left
    assert rows.since(3) is None
    assert rows.since(5) is None


def test_one_number_one_row_or_many_make_no_difference() -> None:
    for value in (0.4, 0.5, math.nan, math.inf):
        for threshold in (-math.inf, 0.5, math.inf):
            alone = leaves(value, threshold)
            assert leaves(np.array([value, 0.0]), threshold).tolist()[0] == alone
            assert leaves(torch.tensor([value, 0.0]), threshold).tolist()[0] == alone
