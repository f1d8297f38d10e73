"""Thresholds from held-out data."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import dynnet
from dynnet.cost.ledger import Ledger, Segment
from dynnet.errors import CalibrationError, DataError, NonFiniteError
from dynnet.exits.confidence import make_measure
from dynnet.thresholds.answers import Answers, collect
from dynnet.thresholds.goals import _spending
from dynnet.thresholds.search import trade_off
from dynnet.thresholds.table import Table
from tests.cases import tiny

LEDGER = Ledger((Segment(100, 5), Segment(100, 5), Segment(100)), {})
SIZE = (3, 32, 32)


def answers(samples: int = 300, seed: int = 0) -> Answers:
    """Deeper exits are right more often, and confidence tells a good part of it."""
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(size=(samples, 1))
    noise = rng.normal(0, 0.15, size=(samples, 3))
    margin = np.array([0.55, 0.75, 0.95]) - hardness + noise
    labels = rng.integers(0, 4, samples)
    predictions = np.where(margin > 0, labels[:, None], (labels[:, None] + 1) % 4)
    confidences = 1 / (1 + np.exp(-6 * margin + rng.normal(0, 1, size=margin.shape)))
    return Answers(labels, predictions, confidences, ("a", "b"), SIZE)


def table(said: Answers, ledger: Ledger = LEDGER) -> Table:
    return Table(said, ledger, make_measure("max_probability", 2))


def images(count: int = 60) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    y = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(4))
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def test_the_trade_off_is_as_good_as_trying_everything() -> None:
    said = answers()
    grid = [-math.inf, *np.quantile(said.confidences[:, :2], np.linspace(0.02, 0.98, 40)), math.inf]
    exhaustive = [table(said).point(t) for t in itertools.product(grid, grid)]
    points = trade_off(table(said))
    for budget in (0.5, 0.6, 0.7, 0.8, 0.9):
        best = max(p.accuracy for p in exhaustive if p.macs <= budget * LEDGER.dense)
        ours = max(p.accuracy for p in points if p.macs <= budget * LEDGER.dense)
        assert ours >= best - 0.01


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_an_exit_of_which_confidence_says_little_is_searched_too(slope: float) -> None:
    """One step from where its head is off costs more than it saves; many do not."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, 2000)
    right = np.stack([rng.uniform(size=2000) < 0.6 + slope * confidence, rng.uniform(size=2000) < 0.92], 1)
    said = Answers(np.zeros(2000, int), 1 - right, np.stack([confidence, np.ones(2000)], 1), ("a",), SIZE)
    one = table(said, Ledger((Segment(40, 3), Segment(60)), {}))
    every = [one.point((t,)) for t in np.quantile(confidence, np.linspace(0, 1, 200))]
    points = trade_off(one)
    for budget in (0.5, 0.7, 0.9):
        best = max(p.accuracy for p in every if p.macs <= 100 * budget)
        assert max(p.accuracy for p in points if p.macs <= 100 * budget) >= best - 0.006


def test_of_equally_good_points_the_one_that_spends_more_is_taken() -> None:
    # 200 samples; early is right for all but 2, late for all but 1: a difference of 1 is no difference.
    early, late = np.ones(200, dtype=np.int64), np.ones(200, dtype=np.int64)
    early[:2], late[2:3] = 0, 0
    predictions = np.stack([early, late, late], 1)
    confidences = np.stack([np.full(200, 0.9), np.full(200, 0.5), np.full(200, 0.5)], 1)
    said = Answers(np.ones(200, dtype=np.int64), predictions, confidences, ("a", "b"), SIZE)
    never, first = (math.inf, math.inf), (0.9, math.inf)
    points = [table(said).point(t) for t in (first, never)]
    assert _spending(table(said), points).thresholds == never
    late[2:40] = 0
    worse = replace(said, predictions=np.stack([early, late, late], 1))
    points = [table(worse).point(t) for t in (first, never)]
    assert _spending(table(worse), points).thresholds == first


def test_points_rise_and_mean_what_they_say() -> None:
    said = answers()
    points = trade_off(table(said))
    assert len(points) > 10
    for a, b in itertools.pairwise(points):
        assert a.macs < b.macs
        assert a.accuracy < b.accuracy
    for p in points:
        assert table(said).point(p.thresholds) == p


def test_an_exit_that_does_not_pay_is_switched_off() -> None:
    said = answers()
    dear = Ledger((Segment(100, 5), Segment(100, 150), Segment(100)), {})
    for point in trade_off(table(said, dear)):
        assert point.thresholds[1] == math.inf or point.macs > 250


def test_a_budget_is_kept_and_an_accuracy_drop_is_bounded() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    budgeted = dynnet.calibrate(model, images(), budget=0.7)
    assert budgeted.macs <= 0.7 * budgeted.dense_macs
    assert model.calibration is not None
    assert model.calibration["goal"] == "budget"
    bounded = dynnet.calibrate(model, images(), accuracy_drop=0.3)
    assert bounded.samples == 60
    # What was promised on the held-out data is what running the model on them gives.
    measured = dynnet.measure(model, images())
    assert measured.accuracy == pytest.approx(bounded.accuracy)
    assert measured.macs.mean() == pytest.approx(bounded.macs)
    assert measured.rates == pytest.approx(bounded.rates)
    assert "accuracy_drop=0.3" in str(bounded)


def test_too_few_samples_tell_no_drop() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    few = [(torch.randn(9, 3, 32, 32), torch.zeros(9, dtype=torch.long))]
    assert dynnet.calibrate(model, few, budget=0.9).drop is None
    with pytest.raises(CalibrationError, match="1 samples cannot be halved, to learn from one half; give more"):
        dynnet.calibrate(model, [(few[0][0][:1], few[0][1][:1])], accuracy_drop=0.1)


def test_impossible_goals_are_refused_and_change_nothing() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    model.thresholds = [0.4]
    floor = (model.ledger().segments[0].macs + model.ledger().heads[0]) / model.ledger().dense
    with pytest.raises(CalibrationError, match=rf"leaving at the first exit '0' costs {floor:.3f} already"):
        dynnet.calibrate(model, images(), budget=floor / 2)
    with pytest.raises(CalibrationError, match="give exactly one"):
        dynnet.calibrate(model, images())
    with pytest.raises(CalibrationError, match="give exactly one"):
        dynnet.calibrate(model, images(), budget=0.5, accuracy_drop=0.1)
    with pytest.raises(CalibrationError, match=r"accuracy_drop=1.5: give a share in \(0, 1\)"):
        dynnet.calibrate(model, images(), accuracy_drop=1.5)
    with pytest.raises(CalibrationError, match="costs"):
        dynnet.calibrate(model, images(), budget=math.nan)
    with pytest.raises(DataError, match="the loader gave no batches"):
        dynnet.calibrate(model, [], budget=0.9)
    with pytest.raises(DataError, match=r"are no classes 0 .. 3 .* the model has 4 classes"):
        dynnet.calibrate(model, [(torch.randn(2, 3, 32, 32), torch.tensor([1, 4]))], budget=0.9)
    assert model.thresholds == (0.4,)


def test_nan_in_the_final_classifier_is_an_error_and_in_an_exit_is_not() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    with torch.no_grad():
        model.heads[0].classifier.bias.fill_(math.nan)
    said = collect(model, images())
    assert np.isnan(said.confidences[:, 0]).all()
    assert (said.route([-math.inf]) == 1).all()
    dynnet.calibrate(model, images(), accuracy_drop=0.1)
    with torch.no_grad():
        model.backbone[-1].bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the final classifier gave NaN or infinity for 40 of samples 0 to 39"):
        collect(model, images())


def test_a_budget_that_nan_makes_impossible_is_told() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    with torch.no_grad():
        model.heads[0].classifier.bias.fill_(math.nan)
    with pytest.raises(CalibrationError, match="cannot be met on these samples: the least is 1.000"):
        dynnet.calibrate(model, images(), budget=0.9)


def test_prices_follow_the_size_of_the_images() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    large = [(torch.randn(10, 3, 64, 64), torch.zeros(10, dtype=torch.long))]
    fitted = dynnet.calibrate(model, large, accuracy_drop=0.1)
    assert fitted.dense_macs == dynnet.measure(model, large).ledger.dense == model.ledger((3, 64, 64)).dense
    with pytest.raises(DataError, match="gave images of sizes .* give all the same size"):
        dynnet.calibrate(model, [*large, *images()], accuracy_drop=0.1)


def test_measuring_reads_a_loader_once() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    dynnet.calibrate(model, images(), budget=0.75)
    once, again = dynnet.measure(model, iter(images())), dynnet.measure(model, images())
    assert (once.exit == again.exit).all()
    # What the table says each exit would have done is what the running model did.
    assert (once.answers.route(model.thresholds) == once.exit).all()


def test_batches_that_are_none_are_told_and_a_budget_wants_labels() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=SIZE).eval()
    ((x, y), _) = images()
    for batch, error, match in (
        ({"image": x, "label": y}, DataError, r"batch 0 is a dictionary with \['image', 'label'\]"),
        ((x, y[:7]), DataError, "7 labels for the 40 images of samples 0 to 39"),
        (x, CalibrationError, "budget counts right answers, but the loader gave images without labels"),
    ):
        with pytest.raises(error, match=match):
            dynnet.calibrate(model, [batch], budget=0.9)  # type: ignore[list-item]
    assert model.thresholds == (math.inf,)


def test_collecting_leaves_the_mode_alone() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32)).train()
    before = model.backbone[0][1].running_mean.clone()
    collect(model, images())
    assert model.training
    assert torch.equal(model.backbone[0][1].running_mean, before)
