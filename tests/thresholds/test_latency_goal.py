"""Thresholds for a time in an engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import dynnet
from dynnet.deploy.stage_times import Running, StageTimes, Times
from dynnet.errors import CalibrationError, ExportError
from dynnet.exits.confidence import make_measure
from dynnet.thresholds.goals import Clocked, Latency
from tests.cases import tiny
from tests.exported import two_exits
from tests.thresholds.test_calibration import answers, table

ALONE = [(True, False), (False, True)]


class World:
    """Milliseconds of an image, of segments and heads; several heads disturb each other."""

    def __init__(self, segments: Sequence[float] = (4.0, 3.0, 3.0), heads: Sequence[float] = (0.2, 0.2)) -> None:
        self.segments, self.heads, self.asked = segments, heads, list[Running]()

    def __call__(self, sets: Sequence[Running]) -> Mapping[Running, Times]:
        self.asked += sets
        return {running: self.times(running) for running in sets}

    def times(self, running: Running) -> Times:
        ends, spent = np.cumsum(self.segments), np.cumsum([*np.multiply(self.heads, running), 0])
        leaving = np.where([*running, True], ends + spent, np.nan)
        return Times(ends[-1:], (leaving * (1.04 if sum(running) > 1 else 1))[:, None])

    def goal(self, share: float) -> Latency:
        return Latency(share, times=StageTimes(self, ALONE, [1]))


def mean_ms(world: World, thresholds: Sequence[float]) -> float:
    """Added up image by image."""
    running = tuple(t != math.inf for t in thresholds)
    leaving = world.times(running).leaving[:, 0] if any(running) else [math.nan] * 2 + [sum(world.segments)]
    return float(np.mean([leaving[exit] for exit in answers().route(thresholds)]))


@pytest.mark.parametrize("share", [0.55, 0.7, 0.85])
def test_the_best_accuracy_within_the_time_is_taken(share: float) -> None:
    world = World()
    point, drop, verdict, clocked = world.goal(share).choose(table(answers()))
    assert clocked is not None
    assert drop is not None
    assert verdict is None
    assert clocked.ms == pytest.approx(mean_ms(world, point.thresholds))
    assert clocked.ms <= share * 10.0
    assert point.macs == table(answers()).point(point.thresholds).macs  # told in MACs, as of any other goal
    assert world.asked[: len(ALONE)] == ALONE
    assert tuple(t != math.inf for t in point.thresholds) in world.asked  # what is chosen was measured
    grid = [-math.inf, *np.quantile(answers().confidences[:, :2], np.linspace(0.02, 0.98, 30)), math.inf]
    within = [t for t in itertools.product(grid, grid) if mean_ms(world, t) <= share * 10.0]
    best = max(float(answers().right(t).mean()) for t in within)
    assert point.accuracy >= best - 0.03  # two standard errors are spent on more time


def test_a_head_that_takes_more_time_than_it_saves_is_switched_off() -> None:
    world = World(segments=(9.0, 0.5, 3.0), heads=(3.0, 0.1))
    point = world.goal(0.95).choose(table(answers())).point
    assert point.thresholds[0] == math.inf
    assert point.thresholds[1] < math.inf
    # By MACs, of which each head costs the same, the first exit runs.
    assert World().goal(0.6).choose(table(answers())).point.thresholds[0] < math.inf


def test_a_time_that_cannot_be_met_is_told() -> None:
    with pytest.raises(CalibrationError, match=r"0\.2 of the bare backbone's time .* the least is 0\.4"):
        World().goal(0.2).choose(table(answers()))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"latency": 0.0}, CalibrationError, r"give a share of the bare backbone's time, such as 0\.5"),
        ({"latency": math.nan}, CalibrationError, "give a share"),
        ({"latency": 0.5, "batch_size": 0}, CalibrationError, "at least one image"),
        ({"latency": 0.5, "engine": "onxruntime"}, ExportError, "did you mean 'onnxruntime'"),
        ({"latency": 0.5, "budget": 0.5}, CalibrationError, "exactly one of budget=, latency="),
    ],
)
def test_what_is_no_time_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        dynnet.calibrate(two_exits(torch.randn(20, 3, 32, 32)), [], **arguments)


def test_python_that_no_engine_runs_has_no_time() -> None:
    model = two_exits(torch.randn(20, 3, 32, 32))
    model.measure = make_measure(lambda logits: torch.tensor([float(x.max()) for x in logits]), 2)
    with pytest.raises(CalibrationError, match="Python code, which no engine runs"):
        dynnet.calibrate(model, [], latency=0.5)


def test_calibrate_measures_and_records_it() -> None:
    x = torch.randn(80, 3, 32, 32)
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32)).eval()
    # So that it can be met, however the machine measures: nothing need leave.
    fitted = dynnet.calibrate(model, [(x, torch.randint(4, (80,)))], latency=4.0, batch_size=2)
    clocked = fitted.clocked
    assert clocked is not None
    assert 0 < clocked.ms <= 4 * clocked.dense_ms
    assert (clocked.batch_size, clocked.threads) == (2, torch.get_num_threads())
    assert clocked.engine.startswith("onnxruntime ")
    assert "calibrated for latency=4 on 80 samples" in str(fitted)
    assert " ms a batch of 2 (" in str(fitted)
    assert model.calibration is not None
    assert model.calibration["clocked"]["ms"] == clocked.ms
    copied = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32)).eval()
    copied.load_state_dict(model.state_dict())  # it travels
    assert copied.calibration == model.calibration


def test_the_record_is_told_in_words() -> None:
    assert str(Clocked("onnxruntime 1", 1, 1, 4.0, 2.0)) == "2 of 4 ms (50.0%; onnxruntime 1, 1 thread)"
    assert str(Clocked("onnxruntime 1", 2, 8, 4.0, 3.0)) == "3 of 4 ms a batch of 8 (75.0%; onnxruntime 1, 2 threads)"
