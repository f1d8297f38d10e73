"""Every engine answers as the model does, and one that is not there says what to install."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import dynnet
from dynnet.deploy import Runner
from dynnet.deploy.engines import ENGINES, engine, onnxruntime_engine
from dynnet.errors import ExportError
from tests.cases import CASES, leave_one_by_one
from tests.exported import SIZE, agree, two_exits

OTHERS = [name for name in ENGINES if name != "onnxruntime"]  # which test_exporting.py is about


@pytest.fixture(scope="module")
def model() -> dynnet.DynamicModel:
    return two_exits(images(21))


@pytest.fixture(scope="module", params=OTHERS)
def folder(request: pytest.FixtureRequest, model: dynnet.DynamicModel, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "stages"
    manifest = dynnet.export(model, path, engine=request.param)
    assert manifest.engine == request.param
    assert request.param in manifest.versions
    return path


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def test_a_runner_answers_as_the_model_does_in_every_engine(model: dynnet.DynamicModel, folder: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, None):
        runner = Runner(folder, threads=threads)
        for count in (1, 5, 12, 21):
            agree(runner, model, images(count))
    assert torch.get_num_threads() == before
    assert set(runner.predict(images(21).numpy()).exit) == {0, 1, 2}


def test_threads_share_a_runner_in_every_engine(folder: Path) -> None:
    runner = Runner(folder, threads=1)
    expected = {count: runner.predict(images(count).numpy()).logits for count in (1, 5, 12)}
    found: list[bool] = []

    def ask() -> None:
        for count in (1, 5, 12) * 5:
            found.append(np.allclose(runner.predict(images(count).numpy()).logits, expected[count], rtol=0, atol=1e-5))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


@pytest.mark.sweep  # maps do in the suite
@pytest.mark.parametrize("name", OTHERS)
def test_tokens_cross_cuts_in_every_engine(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "test_vit")
    model = case.wrapped([0.4])
    leave_one_by_one(model, case.images(6))
    dynnet.export(model, tmp_path / "stages", engine=name)
    agree(Runner(tmp_path / "stages", threads=1), model, case.images(6))


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_not_installed_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    extra = {"onnxruntime": r"dynnet\[deploy\]", "openvino": r"dynnet\[openvino\]", "torch": "dynnet"}[name]
    with pytest.raises(ExportError, match=f"engine '{name}' is not installed .*; `pip install {extra}`$"):
        engine(name)


def test_a_provider_that_cannot_be_loaded_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def session(path: Any, options: Any, providers: list[str]) -> Any:
        asked.append(providers)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"], get_inputs=list)

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime_engine, "_broken", set())
    with pytest.warns(UserWarning, match="could not load CUDAExecutionProvider: stages run on the CPU"):
        onnxruntime_engine.open_stage(Path("a"), 1, None)
    onnxruntime_engine.open_stage(Path("b"), 1, None)  # a warning would be an error
    assert asked == [both, ["CPUExecutionProvider"]]
