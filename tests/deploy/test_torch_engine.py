"""Graphs of PyTorch are kept as data, and a file cannot name what does harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dynnet
from dynnet.deploy import Runner
from dynnet.deploy.engines import torch_engine
from dynnet.deploy.engines.torch_graphs import read_graph, write_graph
from dynnet.errors import ExportError
from tests.cases import FEW, leave_one_by_one, tiny

CPU = torch.device("cpu")
RELU: dict[str, Any] = {"operator": "aten.relu.default", "args": [{"value": 0}], "kwargs": {}}


def written(path: Path, said: Any) -> Path:
    save_file({"weight": torch.ones(2, 2)}, path, {"dynnet.graph": said if isinstance(said, str) else json.dumps(said)})
    return path


def graph(*steps: Any, **other: Any) -> dict[str, Any]:
    return {"format": 1, "takes": 1, "steps": list(steps), "gives": [{"value": len(steps)}]} | other


def test_a_graph_is_read_as_it_was_written(tmp_path: Path) -> None:
    class Every(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first, second = x.split(2, 1)
            masked = first.masked_fill(first < 0, float("-inf"))
            table = torch.arange(2, dtype=torch.float32, device=x.device).to(torch.float64)
            return (
                masked,
                second + table,
                torch.nn.functional.gelu(x, approximate="tanh").flatten(),
                x.new_zeros(x.shape),
            )

    x = torch.randn(3, 4)
    program = torch.export.export(Every(), (x,), dynamic_shapes=({0: torch.export.Dim("b")},)).run_decompositions({})
    module = program.module()
    # No part of a stage: what only asserts makes no tensor.
    for node in [node for node in module.graph.nodes if "guards" in str(node.target) or "_assert" in str(node.target)]:
        module.graph.erase_node(node)
    write_graph(module, tmp_path / "a")
    found = read_graph(tmp_path / "a", CPU)
    for count in (3, 1, 5):
        x = torch.randn(count, 4)
        for ours, theirs in zip(found(x), Every()(x), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_operators_on_tensors_are_read(tmp_path: Path) -> None:
    module = read_graph(written(tmp_path / "a", graph(RELU)), CPU)
    assert module(torch.tensor([-1.0, 2.0]))[0].tolist() == [0, 2]


@pytest.mark.parametrize(
    "name",
    ["aten.from_file.default", "aten.save.default", "aten.relu_.default", "aten.relu.out", "os.system", "aten.relu",
     "aten.__class__.mro", "aten._sparse_coo_tensor_unsafe.default", "aten.load.default", "prim.Print.default", "eval"],
)  # fmt: skip
def test_a_file_names_no_other_operators(name: str, tmp_path: Path) -> None:
    said = graph({"operator": name, "args": ["x"], "kwargs": {}})
    with pytest.raises(ExportError, match=f"operator {name} is none that a file may name"):
        read_graph(written(tmp_path / "a", said), CPU)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "it is no JSON"),
        (graph(RELU, format=2), "format is 2; expected 1"),
        (graph({**RELU, "kwargs": {"x=0) or print(": 1}}), "aten.relu.default takes no 'x=0"),
        (graph({**RELU, "args": [{"value": 1}]}), "a value is value 1, which there is not"),
        (graph({**RELU, "args": [{"tensor": "bias"}]}), "a value is tensor 'bias', which there is not"),
        (graph({**RELU, "args": [{"dtype": "load"}]}), "a value is dtype 'load', which there is not"),
        (graph({**RELU, "args": [{"value": 0, "tensor": "weight"}]}), "has the keys .*; expected one"),
    ],
)
def test_a_file_that_says_something_else_is_told(said: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        read_graph(written(tmp_path / "a", said), CPU)


def test_what_is_no_such_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"nothing at all")
    with pytest.raises(ExportError, match="is no graph of operators: .*; export the model again"):
        torch_engine.open_stage(tmp_path / "a", 1, None)


@pytest.fixture
def model() -> dynnet.DynamicModel:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    leave_one_by_one(model, torch.randn(12, 3, 32, 32))
    return model


def test_without_a_compiler_stages_run_as_they_are(
    model: dynnet.DynamicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def run(*_: Any) -> Any:
            raise RuntimeError("no compiler was found")

        return run

    monkeypatch.setattr(torch_engine, "_gains", lambda device: True)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile failed, and a stage runs as it is.*no compiler was found"):
        dynnet.export(model, tmp_path / "stages", engine="torch")
    x, runner = torch.randn(5, 3, 32, 32), Runner(tmp_path / "stages", threads=1)
    with pytest.warns(UserWarning, match="torch.compile failed"):
        found = runner.predict(x.numpy())
    assert (found.exit == model.predict(x).exit.numpy()).all()
    assert np.array_equal(runner.predict(x.numpy()).logits, found.logits)  # told once a stage


@pytest.mark.filterwarnings("ignore:gates close other channels")
def test_gates_on_channels_are_exported_too(tmp_path: Path) -> None:
    model, x = FEW[0].wrapped(gates=dynnet.GateConfig(unit=2)), FEW[0].images(5)
    dynnet.export(model, tmp_path / "stages", engine="torch")
    found = Runner(tmp_path / "stages", threads=1).predict(x.numpy())
    np.testing.assert_allclose(found.logits, model.predict(x).logits.numpy(), rtol=0, atol=1e-4)


@pytest.mark.sweep
def test_compiled_stages_answer_as_the_model_does(
    model: dynnet.DynamicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "_gains", lambda device: True)
    dynnet.export(model, tmp_path / "stages", engine="torch")
    runner = Runner(tmp_path / "stages", threads=1)
    for count in (5, 1, 12, 7):
        x = torch.randn(count, 3, 32, 32)
        np.testing.assert_allclose(runner.predict(x.numpy()).logits, model.predict(x).logits.numpy(), rtol=0, atol=1e-4)
