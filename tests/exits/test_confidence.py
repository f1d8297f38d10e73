"""When a sample answers early."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dynnet
from dynnet.errors import DataError, ThresholdError
from dynnet.exits.confidence import (
    MEASURES,
    Patience,
    entropy,
    make_measure,
    margin,
    max_probability,
)
from dynnet.exits.rows import leaves
from dynnet.exits.threshold import check_thresholds
from tests.cases import leave_one_by_one, tiny

SURE, TORN = [9.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("measure", [max_probability, margin, entropy])
def test_measures_rank_and_stay_in_range(measure) -> None:
    sure, torn, blank = measure(torch.tensor([SURE, TORN, [0.0] * 4])).tolist()
    assert 1 >= sure > torn >= blank >= -1e-6
    assert sure > 0.99
    assert torch.isnan(measure(torch.full((1, 4), math.nan))).all()


def test_measures_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    assert max_probability(logits).item() == pytest.approx(0.5)
    assert margin(logits).item() == pytest.approx(0.2)
    h = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert entropy(logits).item() == pytest.approx(1 - h / math.log(3), abs=1e-5)
    # A probability of zero adds no entropy.
    assert entropy(torch.tensor([[0.0, -math.inf, -math.inf]])).item() == pytest.approx(1.0)


def test_patience_counts_agreement_per_sample() -> None:
    patience = Patience(exits=2)
    one = torch.eye(4)[[0, 1]]
    confidence, memory = patience(one, None)
    assert confidence.tolist() == [1 / 3, 1 / 3]
    confidence, memory = patience(torch.eye(4)[[0, 2]], memory)
    assert confidence.tolist() == [2 / 3, 1 / 3]
    confidence, _ = patience(torch.eye(4)[[3, 2]], memory)
    assert confidence.tolist() == [1 / 3, 2 / 3]


def test_a_nan_exit_has_no_vote() -> None:
    patience = Patience(exits=2)
    _, memory = patience(torch.full((1, 4), math.nan), None)
    confidence, _ = patience(torch.eye(4)[[0]], memory)
    assert confidence.tolist() == [1 / 3]


def test_saturated_confidences_leave_where_they_were_fitted_to() -> None:
    confidence = torch.tensor([1.0, 1.0 - 2**-24])
    for threshold in (1 + 1e-9, 1 - 2**-25, 1.0):
        assert leaves(confidence, threshold).tolist() == (confidence.double().numpy() >= threshold).tolist()
    assert not leaves(confidence, 1 + 1e-9).any()


def test_patience_runs_in_a_model() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32), confidence="patience")
    model.thresholds = [math.inf, 2 / 3]
    images = torch.randn(16, 3, 32, 32)
    prediction = model.predict(images)
    said = [x.argmax(1) for x in model.forward_exits(images).logits]
    agree = said[0] == said[1]
    assert 0 < agree.sum() < 16
    assert (prediction.exit == torch.where(agree, 1, 2)).all()
    # Every vote counts, so every head that was passed is billed.
    ledger = model.ledger()
    assert prediction.macs.max() == ledger.dense + sum(ledger.heads)


def test_a_threshold_is_inclusive_and_nan_never_leaves() -> None:
    confidence = torch.tensor([0.5, 0.49, math.nan, 1.0])
    assert leaves(confidence, 0.5).tolist() == [True, False, False, True]
    assert leaves(confidence, -math.inf).tolist() == [True, True, False, True]
    assert leaves(confidence, math.inf).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([0.5], r"got 1 thresholds for 2 exits \['a', 'b'\]; give one per exit"),
        ([0.5, math.nan], "the threshold of exit 'b' is NaN"),
        (0.5, "give a sequence of numbers"),
        (["a", "b"], "give a sequence of numbers"),
    ],
)
def test_wrong_thresholds_are_refused(thresholds, message: str) -> None:
    with pytest.raises(ThresholdError, match=message):
        check_thresholds(thresholds, ["a", "b"])


def test_thresholds_of_a_model_are_checked_and_forget_their_calibration() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    model.calibration = {"goal": "budget"}
    for given in (torch.tensor([0.25]), np.array([0.25]), (0.25,)):
        model.thresholds = given
    assert model.thresholds == (0.25,)
    assert model.calibration is None
    with pytest.raises(ThresholdError):
        model.thresholds = []
    assert model.thresholds == (0.25,)


def test_unknown_measures_are_refused() -> None:
    with pytest.raises(ThresholdError, match="unknown confidence 'margins'; did you mean 'margin'"):
        make_measure("margins", 2)
    with pytest.raises(ThresholdError, match=r"gave shape \(2, 4\) for logits of shape \(2, 4\)"):
        make_measure(lambda x: x, 2)(torch.zeros(2, 4), None)


@pytest.mark.parametrize("confidence", MEASURES)
@pytest.mark.parametrize("exits", [["0"], []])
def test_one_logit_says_nothing_to_a_measure_that_compares_classes(confidence: str, exits: list[str]) -> None:
    backbone = tiny(classes=1)
    told = rf"Sequential answers with one logit, and '{confidence}' compares classes: .* two classes; or, as for regr"
    with pytest.raises(ThresholdError, match=told):
        dynnet.wrap(backbone, exits, input_size=(3, 32, 32), confidence=confidence)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def from_even(logits: torch.Tensor) -> torch.Tensor:
    return (2 * logits[:, 0].sigmoid() - 1).abs()


def test_a_measure_of_ones_own_may_read_one_logit(tmp_path: Path) -> None:
    model = dynnet.wrap(tiny(classes=1), ["0", "1"], input_size=(3, 32, 32), confidence=from_even)
    images = torch.randn(9, 3, 32, 32)
    taken = leave_one_by_one(model, images, from_even)
    assert model.predict(images).exit.tolist() == taken.tolist()
    assert set(taken.tolist()) == {0, 1, 2}
    dynnet.verify(model, images)
    dynnet.save(model, tmp_path / "m.safetensors")
    again = dynnet.load(tmp_path / "m.safetensors", backbone=tiny(classes=1), confidence=from_even)
    assert torch.equal(again(images), model(images))
    with pytest.raises(DataError, match=r"are no classes 0 .. 0 .* the model has 1 classes"):
        dynnet.calibrate(model, [(images, torch.arange(9) % 2)], budget=0.9)
    with pytest.raises(DataError, match=r"are no classes 0 .. 0"):
        dynnet.calibrate(model, [(images, torch.rand(9, 1))], budget=0.9)
    assert model.thresholds != (math.inf, math.inf)


@pytest.mark.parametrize("size", [1, 3])
def test_a_measure_may_give_whole_numbers(size: int) -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32), confidence=lambda x: (x.amax(1) > -1e9).long())
    model.thresholds = [1]
    assert model.predict(torch.randn(size, 3, 32, 32)).exit.tolist() == [0] * size
