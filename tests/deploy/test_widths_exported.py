"""Models of several widths as stages: each width is one, and every sample runs through those that routers want."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import dynnet
from dynnet.deploy import Runner
from dynnet.deploy.manifest import NAME
from dynnet.deploy.runner import wanted
from dynnet.errors import ExportError, InputError
from tests.cases import FEW, Case
from tests.gates.routed import MORE, SOME, routed, widths_taken

OFF = float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _, _ = routed(FEW[0])
    model.thresholds = [OFF, 0.2]
    path = tmp_path_factory.mktemp("widths") / "stages"
    dynnet.export(model, path)
    return path


def test_a_runner_answers_and_bills_as_the_model(folder: Path) -> None:
    _as_the_model(FEW[0], Runner(folder, threads=1))


@pytest.mark.sweep
@pytest.mark.parametrize("case", [*SOME, *MORE], ids=str)
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_so_it_does_of_other_families_and_in_other_engines(case: Case, engine: str, tmp_path: Path) -> None:
    model, _, _ = routed(case)
    model.thresholds = [OFF, 0.2]
    dynnet.export(model, tmp_path / "stages", engine=engine)
    _as_the_model(case, Runner(tmp_path / "stages", threads=1))


@pytest.mark.sweep
def test_widths_run_in_int8(folder: Path, tmp_path: Path) -> None:
    model, _, images = routed(FEW[0])
    model.thresholds = [OFF, 0.2]
    loader = [(images + 0.1 * torch.randn(len(images), *model.input_size), 0) for _ in range(50)]
    said = dynnet.export(model, tmp_path / "stages", int8=True, loader=loader)
    assert said.precision == "int8"
    assert said.quantized is not None
    assert said.quantized.agreement > 0.6  # untrained, and so never sure
    x = torch.cat([batch for batch, _ in loader]).numpy()
    exact, coarse = (Runner(path, threads=1) for path in (folder, tmp_path / "stages"))
    exact.thresholds = [OFF, 0.2]
    before, after = exact.predict(x), coarse.predict(x)
    assert (before.logits.argmax(1) == after.logits.argmax(1)).mean() > 0.6
    assert not np.array_equal(before.logits, after.logits)
    # Routers stay in float: what they read is coarser, and few change their minds.
    assert abs(before.macs.mean() / after.macs.mean() - 1) < 0.05
    names = [part.file for part in said.stages]
    ops = {name: [node.op_type for node in onnx.load(tmp_path / "stages" / name).graph.node] for name in names}
    assert all("QuantizeLinear" in ops[name] for name in names if "width" in name)


def _as_the_model(case: Case, runner: Runner) -> None:
    """Of a model whose first exit is off, where half of the images leave at the second."""
    model, gates, images = routed(case)
    assert max(len(set(taken)) for taken in widths_taken(model, images)) > 1
    model.thresholds = [OFF, OFF]
    second = model.forward_exits(images).logits[1].detach().softmax(1).amax(1).sort().values
    model.thresholds = runner.thresholds = [OFF, float(second[2:4].mean())]
    expected, found = model.predict(images), runner.predict(images.numpy())
    assert found.exit.tolist() == expected.exit.tolist()
    assert set(found.exit) == {1, 2}
    scale = float(expected.logits.abs().max()) + 1e-6
    assert np.abs(found.logits - expected.logits.numpy()).max() < 1e-4 * scale
    # A router runs for all that come to it, also for those that leave there.
    routers = {region.segment - 1: region.macs for region in gates.plan.regions}
    more = [routers.get(exit, 0) if exit < 2 else 0 for exit in found.exit]
    assert (found.macs - np.array(more)).tolist() == expected.macs.tolist()
    alone = np.concatenate([runner.predict(image[None].numpy()).logits for image in images])
    assert np.abs(alone - found.logits).max() < 1e-4 * scale


def test_where_only_a_router_stands_nobody_can_leave(folder: Path) -> None:
    model, _, images = routed(FEW[0])
    model.thresholds = [OFF, 0.2]
    runner = Runner(folder, threads=1)
    assert [part.answers for part in runner.manifest.stages][:2] == [False, True]
    assert [part.width for part in runner.manifest.stages] == [None, 0, 1, 2, 0, 1, 2]
    with pytest.raises(InputError, match="'layer1' was switched off when the model was exported"):
        runner.thresholds = [0.5, 0.2]
    runner.thresholds = [OFF, OFF]
    model.thresholds = [OFF, OFF]
    assert np.abs(runner.predict(images.numpy()).logits - model.predict(images).logits.numpy()).max() < 1e-4


def test_a_router_that_gives_nan_takes_the_widest_in_an_engine_too() -> None:
    route = np.array([[np.nan, 9.0, 0.0], [0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert wanted(route).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stages: stages.pop(1), r"stage_1_width_1.onnx has widths \[1, 2\]"),
        (lambda stages: stages[0].update(route=None), "nothing says which of stage_1_width_0.onnx"),
        (lambda stages: stages[0].update(route="x"), "stage_0.onnx does not give 'x'"),
        (lambda stages: stages[2].update(answers=False), "stage_1_width_0.onnx takes or gives something else"),
    ],
)
def test_a_manifest_whose_widths_do_not_fit_is_told(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    said = json.loads((tmp_path / NAME).read_text())
    change(said["stages"])
    (tmp_path / NAME).write_text(json.dumps(said))
    with pytest.raises(ExportError, match=message):
        Runner(tmp_path, threads=1)
