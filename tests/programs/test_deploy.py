"""Export, verify and time, in one command; and time in an engine, in the other programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dynnet
from dynnet.deploy import Runner
from dynnet.errors import ExportError
from eval import deploy, in_engine, latency
from eval.agreement import agreement
from eval.in_engine import time_in_engine
from tests.cases import leave_one_by_one, tiny

SIZE = (3, 32, 32)


def wrapped() -> dynnet.DynamicModel:
    model = dynnet.wrap(tiny(), ["0"], input_size=SIZE)
    leave_one_by_one(model, torch.randn(12, *SIZE))
    return model


def test_a_run_is_exported_verified_and_timed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "stages", tmp_path / "figures.json"
    deploy.main(run, out=out, threads=1, batch=[1, 8], samples=20, calls=3, json=figures)
    found = json.loads(figures.read_text())
    model = dynnet.load(run / "model.safetensors")
    assert Runner(out).thresholds == model.thresholds
    bill = model.ledger().bill(model.running).tolist()
    assert [stage["macs"] for stage in found["stages"]] == [
        m for m, on in zip(bill, [*model.running, True], strict=True) if on
    ]
    assert all(stage["size_bytes"] == (out / stage["file"]).stat().st_size for stage in found["stages"])
    agreed = found["agreement"]
    assert (agreed["images"], agreed["other_exit"], agreed["other_class"]) == (359, 0, 0)
    assert agreed["logits"] < 1e-3
    assert [row["batch_size"] for row in found["timed"]] == [1, 8]
    assert all(row["setting"]["threads"] == 1 and row["eager"]["speedup"] > 0 for row in found["timed"])
    text = capsys.readouterr().out
    assert "the same exit and class for all of them" in text
    assert "time saved" in text
    with pytest.raises(SystemExit):
        deploy.main(run, out=out)
    assert "is there already; remove it, or choose another folder" in capsys.readouterr().err


@pytest.mark.sweep
def test_untrained_models_run_scenarios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    deploy.main(model="test_resnet", exits=1, batch=[2], calls=1, eager=False, json=figures)
    found = json.loads(figures.read_text())
    assert [row["scenario"].split(" at ")[0] for row in found["timed"]] == ["nobody leaves", "half leaves", "all leave"]
    saved = [row["macs_saved"] for row in found["timed"]]
    assert saved[0] < 0 < saved[1] <= saved[2]  # untrained heads may be as sure of the other image
    assert found["agreement"]["images"] == 64
    assert found["agreement"]["other_exit"] == 0
    for wrong, message in (
        ({}, "give one of --run"),
        ({"zoo": "digits", "model": "resnet18"}, "give one of --run"),
        ({"zoo": "digitz"}, "the zoo has no model 'digitz'; did you mean 'digits'"),
        ({"zoo": "digits", "engine": "onnxruntim"}, "unknown engine"),
    ):
        with pytest.raises(SystemExit):
            deploy.main(**wrong)
        assert message in capsys.readouterr().err


@pytest.mark.sweep
def test_untrained_models_are_timed_in_an_engine(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    latency.main(model="test_resnet", exits=1, batch=[2], calls=1, engine="onnxruntime", out=figures)
    nobody, _, everybody = json.loads(figures.read_text())
    assert nobody["macs_saved"] < 0 < everybody["macs_saved"]
    assert nobody["setting"]["engine"].startswith("onnxruntime")


def test_what_differs_is_counted(tmp_path: Path) -> None:
    model, images = wrapped(), torch.randn(12, *SIZE)
    leave_one_by_one(model, images)
    dynnet.export(model, tmp_path / "stages")
    runner = Runner(tmp_path / "stages", 1)
    agreed = agreement(model, runner, images.split(5))
    assert agreed.whole
    assert (agreed.images, agreed.near, agreed.near_other) == (12, 0, 0)
    assert agreed.logits < 1e-4
    runner.thresholds = [-np.inf]
    other = agreement(model, runner, [images])
    assert other.other_exit == int((model.predict(images).exit > 0).sum())
    assert not other.whole
    assert "left elsewhere" in str(other)
    exact = model.predict(images).confidence.double()  # a threshold that an image meets exactly
    first = int((model.predict(images).exit == 0).nonzero()[0])
    model.thresholds = [float(exact[first])]
    runner.thresholds = model.thresholds
    assert agreement(model, runner, [images]).near >= 1


def test_a_report_tells_why_there_are_no_times_in_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ExportError("engine 'onnxruntime' is not installed")

    monkeypatch.setattr(in_engine, "_timed", refuse)
    found = time_in_engine(wrapped(), torch.randn(3, *SIZE))
    assert found == {"engine": None, "engine_reason": "engine 'onnxruntime' is not installed"}


@pytest.mark.sweep
def test_leaving_is_timed_at_every_exit_and_pruned_models_beside(tmp_path: Path) -> None:
    model = wrapped()
    model.thresholds = [float("inf")]
    dynnet.export(tiny(), tmp_path / "int8", int8=True, loader=[torch.randn(64, *SIZE)], input_size=SIZE)
    row = {"name": "thin", "method": "l1 + int8", "accuracy": 0.5, "epochs": 1, "dynamic": False}
    static = [{**row, "file": str(tmp_path / "int8")}]
    found = time_in_engine(model, torch.randn(3, *SIZE), static)["engine"]
    assert [(one["name"], one["ms"] > 0) for one in found["static"]] == [("thin", True)]
    assert found["left_out"] == []
    assert len(found["leaving_ms"]) == 2
    assert found["switched_off"] == ["0"]
    assert min(found["dense_ms"], found["ms"], *found["leaving_ms"]) > 0
