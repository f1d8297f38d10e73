"""A certified risk holds, is told with its condition, and is void for another model."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy.stats import binom

import dynnet
from dynnet.errors import CalibrationError
from dynnet.thresholds.certified import p_value, safe_steps, samples_needed
from dynnet.thresholds.goals import AccuracyDrop, Risk, sequence
from tests.cases import tiny
from tests.thresholds.test_calibration import LEDGER, answers, table

DELTA = 0.05


@pytest.mark.parametrize("risk", [0.001, 0.01, 0.3])
def test_the_test_is_the_exact_binomial_one(risk: float) -> None:
    for samples, failures in itertools.product((1, 7, 300, 20_000), (0, 1, 5, 60)):
        expected = binom.cdf(failures, samples, risk)
        assert p_value(failures, samples, risk) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_no_failure_in_299_samples_shows_one_in_a_hundred() -> None:
    assert samples_needed(0.01, DELTA) == 299
    assert p_value(0, 299, 0.01) <= DELTA < p_value(0, 298, 0.01)
    for rate in (0.001, 0.01, 0.015):
        needed = samples_needed(0.02, DELTA, rate)
        assert p_value(math.ceil(rate * needed), needed, 0.02) <= DELTA
        assert p_value(math.ceil(rate * needed / 2), needed // 2, 0.02) > DELTA


def test_where_a_billion_samples_are_too_few_it_is_told_at_once() -> None:
    needed = samples_needed(0.05, DELTA, 0.0499)
    assert p_value(math.ceil(0.0499 * needed), needed, 0.05) <= DELTA
    assert needed > 10_000_000
    assert samples_needed(0.05, DELTA, 0.049999) == 0


def test_steps_are_those_that_mapie_takes() -> None:
    # Bauer's fixed sequence in the order given; its p-value is the smaller of Hoeffding's and the binomial one.
    rng = np.random.default_rng(0)
    for _ in range(50):
        samples = int(rng.integers(100, 3000))
        failures = np.cumsum(rng.integers(0, 4, 40)).clip(0, samples)
        risk = float(rng.choice([0.005, 0.01, 0.02, 0.05]))
        # Their rate times n is rounded up, to one more where it is off by 1e-16.
        rates = (failures - 1e-6).clip(0) / samples
        values = compute_hoeffding_bentkus_p_value(rates, np.full(40, samples), np.array([risk]), binary=True)[:, 0]
        passed = control_fwer(values, DELTA, fwer_method="fixed_sequence")
        assert safe_steps(failures.tolist(), samples, risk, DELTA) == len(passed)


def test_nothing_is_taken_behind_the_first_step_that_fails() -> None:
    assert safe_steps([0, 1, 50, 0, 0], 1000, 0.01, DELTA) == 2
    assert safe_steps([0, 0], 100, 0.01, DELTA) == 0
    assert safe_steps([], 100, 0.01, DELTA) == 0


@pytest.mark.parametrize(
    "goal", [Risk(0.03), Risk(0.03, of="lost"), AccuracyDrop(0.03)], ids=lambda g: f"{g.name}-{g.of}"
)
def test_a_certified_risk_is_kept_on_new_samples(goal: Risk) -> None:
    unseen = answers(20_000, seed=99)
    broken, saved = 0, []
    for seed in range(15):
        choice = goal.choose(table(answers(600, seed)))
        broken += unseen.harm_at(choice.point.thresholds, goal.of).mean() > goal.value
        saved.append(1 - choice.point.macs / LEDGER.dense)
    # Of 15 at most 3 break a promise of 95%, with a probability of 99.5%.
    assert broken <= 3
    assert np.mean(saved) > 0.1


def test_the_sequence_begins_with_nobody_and_spends_ever_less() -> None:
    steps = sequence(table(answers()))
    assert steps[0].thresholds == (math.inf, math.inf)
    assert len(steps) > 10
    assert all(a.macs >= b.macs for a, b in itertools.pairwise(steps))


def images(count: int, seed: int = 3) -> list[torch.Tensor]:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return list(x.split(64))


def certified() -> tuple[dynnet.DynamicModel, dynnet.Calibration]:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    # Exits that say what the end says, mostly: its classifier, before the last layers have changed much.
    with torch.no_grad():
        model.backbone[-1].weight.zero_()
        model.backbone[-1].bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
        for head in model.heads:
            head.classifier.weight.mul_(0.2)
            head.classifier.bias.copy_(torch.tensor([0.0, 0.0, 0.5, 0.0]))
    return model, dynnet.calibrate(model, images(400), risk=0.05)


def test_disagreement_needs_no_labels() -> None:
    model, fitted = certified()
    assert fitted.accuracy is None
    assert fitted.full_accuracy is None
    assert fitted.drop is None
    assert fitted.certificate is not None
    assert fitted.certificate.samples == 200
    assert fitted.macs < fitted.dense_macs
    assert "certified: at most 5.00% of the answers differ from the full model's, with 95% confidence" in str(fitted)
    assert "accuracy" not in str(fitted)
    with pytest.raises(CalibrationError, match="the loader gave images without labels; give labels, or risk="):
        dynnet.calibrate(model, images(10), risk=0.05, of="lost")


def test_where_nothing_can_be_certified_nobody_exits_and_the_number_is_told() -> None:
    model, _ = certified()
    fitted = dynnet.calibrate(model, images(100), risk=0.01)
    assert fitted.certificate is None
    assert model.thresholds == (math.inf, math.inf)
    assert fitted.needed is not None
    assert fitted.needed >= 2 * 299
    assert f"nothing could be certified, so nobody exits: some {fitted.needed} samples may do" in str(fitted)
    more = dynnet.calibrate(model, images(fitted.needed), risk=0.01)
    assert more.certificate is not None


def test_exits_that_do_harm_are_told() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    with torch.no_grad():
        model.heads[0].classifier.weight.zero_()
        model.heads[0].classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
        model.backbone[-1].bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    fitted = dynnet.calibrate(model, images(100), risk=0.1)
    assert fitted.needed == 0
    assert "nobody exits: the exits harm more than that; train them on" in str(fitted)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"risk": 0.0}, r"risk=0.0: give a share in \(0, 1\)"),
        ({"risk": math.nan}, "risk=nan: give a share"),
        ({"risk": 0.1, "delta": 0.0}, "delta=0.0: give a probability"),
        ({"risk": 0.1, "of": "harm"}, "of='harm': choose from disagreement, lost"),
        ({"risk": 0.1, "budget": 0.5}, "give exactly one of budget=, latency=, accuracy_drop= and risk="),
    ],
)
def test_what_is_no_risk_is_refused(arguments: dict[str, float], match: str) -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    with pytest.raises(CalibrationError, match=match):
        dynnet.calibrate(model, images(10), **arguments)


def test_a_certificate_travels_and_is_void_for_other_weights(tmp_path: Path) -> None:
    model, fitted = certified()
    path = tmp_path / "m.safetensors"
    dynnet.save(model, path)
    again = dynnet.load(path, tiny())
    assert again.calibration == model.calibration
    assert again.calibration["certificate"]["failures"] == fitted.certificate.failures
    with pytest.warns(UserWarning, match="certificate of .* is void: it was given for other weights and precision"):
        dynnet.load(path, tiny().double())
    with torch.no_grad():
        model.heads[0].classifier.bias[0] += 1e-3
    dynnet.save(model, path)
    with pytest.warns(UserWarning, match="is void: it was given for other weights; call dynnet.calibrate again"):
        dynnet.load(path, tiny())
    dynnet.calibrate(model, images(400), risk=0.05)
    model.backbone.pretrained_cfg = {"mean": (0.1, 0.2, 0.3)}
    dynnet.save(model, path)
    with pytest.warns(UserWarning, match="it was given for other preparation"):
        dynnet.load(path, tiny())
    model.thresholds = [0.5, 0.5]
    dynnet.save(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dynnet.load(path, tiny()).calibration is None
