"""Time in an engine: both sides are exported, and run there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dynnet
from dynnet.deploy import Runner
from dynnet.errors import ExportError, InputError
from dynnet.evaluation.timing import Latency
from eval.exported import Exported
from eval.savings import in_words, savings
from tests.cases import leave_one_by_one, tiny

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def model() -> dynnet.DynamicModel:
    torch.manual_seed(0)
    model = dynnet.wrap(tiny(), ["0"], input_size=SIZE)
    leave_one_by_one(model, images())
    return model


def images() -> torch.Tensor:
    return torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(1))


def test_both_sides_run_in_the_engine(model: dynnet.DynamicModel) -> None:
    timed = dynnet.latency(model, images(), engine="onnxruntime", warmup=1)
    assert timed.setting["engine"].startswith("onnxruntime ")
    assert timed.setting["threads"] == torch.get_num_threads()
    expected = model.predict(images()).exit.numpy()
    assert (timed.exits[:, 0] == expected[timed.rows[:, 0]]).all()
    assert timed.dense_ms.min() > 0
    assert sorted(timed.by_exit()) == [0, 1]
    assert "engine onnxruntime" in str(timed)


@pytest.mark.sweep
def test_folders_that_are_there_are_timed(model: dynnet.DynamicModel, tmp_path: Path) -> None:
    exported = Exported(model, "onnxruntime", tmp_path)
    dynamic, dense = exported.dynamic(), exported.dense()
    assert len(dense.manifest.stages) == 1
    timed = dynnet.latency(dynamic, images(), against=dense, batch_size=3, calls=4, warmup=0)
    assert timed.exits.shape == (4, 3)
    assert dynnet.latency(dynamic, images(), against=model, warmup=0).exits.shape == (6, 1)  # another engine beside
    with pytest.raises(InputError, match="a runner has no bare backbone to be compared with; give against="):
        dynnet.latency(dynamic, images())
    # One folder for each set of exits that run.
    before = model.thresholds
    model.thresholds = [float("inf")]
    assert [stage.exit for stage in exported.dynamic().manifest.stages] == [1]
    model.thresholds = [0.2]
    assert exported.dynamic().thresholds == (0.2,)
    model.thresholds = before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "exits_0", "exits_1"]
    assert isinstance(exported.every_exit(), Runner)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_engine_that_is_not_there_is_told(model: dynnet.DynamicModel) -> None:
    with pytest.raises(ExportError, match="unknown engine 'onnxruntim'; did you mean 'onnxruntime'"):
        dynnet.latency(model, images(), engine="onnxruntim")


def test_savings_are_of_typical_calls() -> None:
    setting = {"threads": 1}
    exits = np.array([[0], [0], [0], [1]])
    timed = Latency(1, exits, exits, np.full(4, 2.0), np.array([1.0, 1.0, 9.0, 3.0]), setting)
    saved = savings(timed, [50, 120], 100)
    assert saved["macs_saved"] == pytest.approx(1 - (3 * 50 + 120) / 400)
    assert saved["time_saved"] == pytest.approx(1 - (0.75 * 0.5 + 0.25 * 1.5))  # the slow call is one of three
    assert saved["time_by_macs"] == pytest.approx(saved["time_saved"] / saved["macs_saved"])
    assert "MACs saved +32.5%, time saved +25.0%, 0.77 of the MACs saved" in in_words(saved)
    assert savings(timed, [100, 100], 100)["time_by_macs"] is None
