"""The watch over a certified risk: seldom wrong for all time, and quick."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dynnet
from dynnet.errors import CalibrationError
from dynnet.thresholds.auditing import audited
from dynnet.thresholds.watch import Watch
from tests.cases import leave_one_by_one, tiny


def stopped(rng: np.random.Generator, rates: np.ndarray) -> int | None:
    """When a watch over a risk of 1% gives an alarm, if it does, where answers are harmed at these rates."""
    watch = Watch(0.01)
    watch.see((rng.random(len(rates)) < rates).tolist())
    return watch.audited if watch.alarm else None


def test_an_alarm_is_seldom_false() -> None:
    rng = np.random.default_rng(0)
    alarms = [stopped(rng, np.full(3000, 0.01)) for _ in range(100)]
    assert sum(alarm is not None for alarm in alarms) <= 10  # of 5 at most in the mean; more than 10 in 1% of all tries


@pytest.mark.parametrize(("change", "delay"), [(0, 350), (1000, 650)])
def test_a_change_is_told_soon(change: int, delay: int) -> None:
    rng = np.random.default_rng(0)
    rates = np.where(np.arange(change + 3000) < change, 0.01, 0.03)
    alarms = [stopped(rng, rates) for _ in range(60)]
    assert np.median([alarm - change if alarm else math.inf for alarm in alarms]) < delay


def test_evidence_is_a_fair_bet_at_most() -> None:
    # Over all 2^8 outcomes at the certified risk the mean evidence is 1, at a smaller one it is less.
    for rate in (0.2, 0.1):
        mean = 0.0
        for outcome in range(2**8):
            bits = [bool(outcome >> i & 1) for i in range(8)]
            watch = Watch(0.2, 1e-9)
            watch.see(bits)
            mean += watch.evidence * rate ** sum(bits) * (1 - rate) ** (8 - sum(bits))
        assert mean == pytest.approx(1.0) if rate == 0.2 else mean < 0.95


@torch.no_grad()
def test_an_audit_compares_early_answers_with_the_full_models() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32)).eval()
    for head in model.heads:
        head.classifier.weight.mul_(20)  # answers of their own
    images = torch.randn(64, 3, 32, 32)
    leave_one_by_one(model, images)
    prediction, generator = model.predict(images), torch.Generator().manual_seed(0)
    full = model.forward_exits(images).logits[-1].argmax(1)
    expected = (prediction.logits.argmax(1) != full).tolist()
    assert audited(model, images, prediction, 1.0, generator) == expected
    assert 0 < sum(expected) < 64
    assert not any(taken == 2 and disagrees for taken, disagrees in zip(prediction.exit, expected, strict=True))
    assert audited(model, images, prediction, 0.0, generator) == []
    assert 16 < len(audited(model, images, prediction, 0.5, generator)) < 48


def test_an_alarm_stays() -> None:
    watch = Watch(0.01)
    assert watch.see([True] * 5)
    assert watch.see([False])
    assert watch.audited == watch.failures + 1
    with pytest.raises(CalibrationError, match="risk=0.0, delta=0.05: give two shares"):
        Watch(0.0)
