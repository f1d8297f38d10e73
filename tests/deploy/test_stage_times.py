"""Times of stages: taken apart and put together again, in the mean over batches, and measured in an engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import binom

import dynnet
from dynnet.deploy.stage_times import Running, StageTimes, Times, binomial, measure_times
from tests.exported import two_exits

ROWS = (1, 4, 10)
SEGMENTS, HEADS = (2.0, 3.0, 5.0), (0.5, 0.25)  # milliseconds of a row
START = 0.1  # of every stage, however many rows it gets


def world(sets: Sequence[Running], surcharge: float = 0.0) -> Mapping[Running, Times]:
    """An engine in which every stage takes its parts' times, and something to start; with several exits on, more."""
    rows = np.array(ROWS, dtype=float)
    found = {}
    for running in sets:
        leaving, spent = np.full((len(running) + 1, len(ROWS)), np.nan), np.zeros(len(ROWS))
        for exit, segment in enumerate(SEGMENTS):
            spent = spent + segment * rows
            if exit == len(running) or running[exit]:
                spent = spent + START + (HEADS[exit] * rows if exit < len(running) else 0)
                leaving[exit] = spent + surcharge * (sum(running) > 1)
        found[running] = Times(sum(SEGMENTS) * rows + START, leaving)
    return found


def alone(exits: int = 2) -> list[Running]:
    return [tuple(e == exit for e in range(exits)) for exit in range(exits)]


def test_what_several_exits_take_is_put_together_from_one_at_a_time() -> None:
    times = StageTimes(world, alone(), ROWS)
    both = (True, True)
    np.testing.assert_allclose(times.leaving(both), world([both])[both].leaving)
    ledger = times.ledger()
    each = [(s.macs, s.head) for s in ledger.segments]
    start = START / ROWS[-1] * 1e6  # heads bear the start of the stage behind them
    expected = [(2e6, 0.5e6 + start), (3e6, 0.25e6 + start), (5e6 + start, 0)]
    assert each == [tuple(map(round, pair)) for pair in expected]
    assert ledger.dense == round(sum(SEGMENTS) * 1e6 + start)


def test_what_was_measured_counts() -> None:
    def dearer(sets: Sequence[Running]) -> Mapping[Running, Times]:
        return world(sets, surcharge=1.0)

    times, both = StageTimes(dearer, alone(), ROWS), (True, True)
    before = times.leaving(both)
    times.learn(both)
    np.testing.assert_allclose(times.leaving(both), before + 1.0)


def test_the_mean_is_over_batches_that_are_drawn() -> None:
    times, both = StageTimes(world, alone(), ROWS), (True, True)
    rng = np.random.default_rng(0)
    taken = rng.choice(3, 500, p=[0.5, 0.3, 0.2])
    drawn = []
    for batch in rng.choice(taken, (20_000, ROWS[-1])):
        counts = [(batch >= exit).sum() for exit in range(3)]
        stages = [SEGMENTS[0] + HEADS[0], SEGMENTS[1] + HEADS[1], SEGMENTS[2]]
        # Between numbers of rows that were measured, times lie on a line, from nothing for no rows on.
        drawn.append(sum(np.interp(n, [0, *ROWS], [0, *(START + s * np.array(ROWS))])
                         for n, s in zip(counts, stages, strict=True)))  # fmt: skip
    assert times.mean(both, taken) == pytest.approx(np.mean(drawn), rel=3e-3)
    assert times.mean((False, False), taken) == times.dense[-1]  # nothing is cut
    single = StageTimes(world, alone(), ROWS)
    assert single.mean((True, False), np.zeros(5, int)) == pytest.approx(START + (SEGMENTS[0] + HEADS[0]) * 10)


def test_a_head_is_never_paid_for_waiting() -> None:
    def odd(sets: Sequence[Running]) -> Mapping[Running, Times]:
        found = world(sets)
        return {running: Times(times.dense * 2, times.leaving) for running, times in found.items()}

    ledger = StageTimes(odd, alone(), ROWS).ledger()
    assert min(itertools.chain(*((s.macs, s.head) for s in ledger.segments))) >= 0


@pytest.mark.parametrize("chance", [0.0, 1e-9, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_binomial_is_exact(count: int, chance: float) -> None:
    np.testing.assert_allclose(binomial(count, chance), binom.pmf(range(count + 1), count, chance), rtol=1e-9, atol=0)


def test_stages_are_measured_in_the_engine() -> None:
    model = two_exits(torch.randn(20, 3, 32, 32))
    kept = model.thresholds
    found = measure_times(model, [(True, False)], engine="onnxruntime", threads=1, rows=[1, 3])
    for running, times in found.items():
        there = np.array([*running, True])
        assert (times.leaving[there] > 0).all()
        assert np.isnan(times.leaving[~there]).all()
        assert times.leaving.shape == (3, 2)
        assert (times.dense > 0).all()
    assert model.thresholds == kept


def test_rows_go_up_to_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[int]] = []

    def measured(model: dynnet.DynamicModel, sets: list[Running], *, rows: Sequence[int], **_: object) -> object:
        asked.append(rows)
        return {running: Times(np.ones(len(rows)), np.ones((3, len(rows)))) for running in sets}

    monkeypatch.setattr("dynnet.deploy.stage_times.measure_times", measured)
    model = two_exits(torch.randn(20, 3, 32, 32))
    for size, rows in ((1, [1]), (4, [1, 4]), (6, [1, 4, 6]), (64, [1, 4, 16, 64])):
        times = StageTimes.of(model, "onnxruntime", size)
        assert (asked[-1], times.batch_size) == (rows, size)
        assert list(times.measured) == alone()
    assert math.isclose(times.dense[-1], 1.0)
