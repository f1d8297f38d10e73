"""Exported models: their answers audited, and their certificates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dynnet
from dynnet.deploy import Runner
from dynnet.thresholds.auditing import audited
from dynnet.thresholds.watch import Watch
from tests.exported import SIZE, two_exits


def images(count: int = 64) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> dynnet.DynamicModel:
    """With exits that often disagree, and a certificate all the same."""
    model = two_exits(images())
    with torch.no_grad():
        for head in model.heads:
            head.classifier.weight.mul_(3)
    dynnet.calibrate(model, images().split(32), risk=0.9, delta=0.4)
    assert model.calibration is not None
    assert model.calibration["certificate"] is not None
    return model


@pytest.fixture(scope="module")
def folder(model: dynnet.DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "stages"
    dynnet.export(model, folder)
    return folder


def test_an_audit_finds_what_the_eager_one_finds(model: dynnet.DynamicModel, folder: Path) -> None:
    runner, x = Runner(folder, threads=1), images()
    prediction = runner.predict(x.numpy())
    theirs = audited(model, x, model.predict(x), 1.0, torch.Generator())
    assert 0 < sum(theirs) < len(theirs)
    assert runner.audit(x.numpy(), prediction, 1.0, np.random.default_rng(0)) == theirs
    assert runner.audit(x.numpy(), prediction, 0.0, np.random.default_rng(0)) == []
    some = runner.audit(x.numpy(), prediction, 0.5, np.random.default_rng(0))
    drawn = np.random.default_rng(0).random(len(x)) < 0.5
    assert some == np.array(theirs)[drawn].tolist()
    assert isinstance(Watch(0.01).see(some), bool)


def test_the_last_exit_agrees_with_itself(folder: Path) -> None:
    runner, x = Runner(folder, threads=1), images(8).numpy()
    patient = runner.at([math.inf] * len(runner.exits))
    assert patient.audit(x, patient.predict(x), 1.0, np.random.default_rng(0)) == [False] * 8


def test_other_thresholds_share_the_stages(folder: Path) -> None:
    runner, x = Runner(folder, threads=1), images(8).numpy()
    before = runner.thresholds
    patient = runner.at([math.inf] * len(runner.exits))
    assert (patient.predict(x).exit == len(runner.exits)).all()
    assert runner.thresholds == before
    assert patient._steps is runner._steps


def test_a_certificate_is_for_its_thresholds(folder: Path) -> None:
    runner = Runner(folder, threads=1)
    assert runner.void is None
    runner.thresholds = [0.123, math.inf]
    assert runner.void == "it was given for other thresholds"


def test_a_void_certificate_is_not_exported(model: dynnet.DynamicModel, tmp_path: Path) -> None:
    other = two_exits(images())
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.heads[0].classifier.bias.add_(0.01)
    with pytest.warns(UserWarning, match="certificate is void: it was given for other weights; call dynnet.calibrate"):
        manifest = dynnet.export(other, tmp_path / "stages")
    assert manifest.calibration is not None
    assert manifest.calibration["certificate"] is None
    assert Runner(tmp_path / "stages", threads=1).void == "it was given for other weights"
