"""Exported models answer as the model does, from their folder, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import dynnet
from dynnet.deploy import Runner
from dynnet.deploy.manifest import NAME
from dynnet.errors import ExportError, InputError, ThresholdError
from tests.cases import CASES, Case, leave_one_by_one, tiny
from tests.exported import SIZE, agree, two_exits


@pytest.fixture(scope="module")
def model() -> dynnet.DynamicModel:
    model = two_exits(images())
    model.backbone.pretrained_cfg = {"label_names": ["ant", "bee", "cat", "dog"], "mean": (0.5, 0.5, 0.5)}
    return model


@pytest.fixture(scope="module")
def folder(model: dynnet.DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "stages"
    dynnet.export(model, path)
    return path


def images(count: int = 12) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def test_a_runner_answers_as_the_model_does(model: dynnet.DynamicModel, folder: Path) -> None:
    runner = Runner(folder, threads=1)
    assert runner.thresholds == model.thresholds
    assert runner.class_names == ("ant", "bee", "cat", "dog")
    assert set(runner.predict(images().numpy()).exit) == {0, 1, 2}
    for count in (1, 5, 12):
        agree(runner, model, images(count))
    together = runner.predict(images().numpy())
    for i in range(12):
        alone = runner.predict(images()[i : i + 1].numpy())
        assert alone.exit == together.exit[i]
        np.testing.assert_allclose(alone.logits[0], together.logits[i], rtol=0, atol=1e-5)


@pytest.mark.sweep  # test_engines.py has one, in the suite
@pytest.mark.parametrize("name", ["test_vit", "crossvit_9_240"])
def test_tokens_and_branches_cross_cuts(name: str, tmp_path: Path) -> None:
    case: Case = next(case for case in CASES if case.name == name)
    model = case.wrapped([0.4])
    leave_one_by_one(model, case.images(6))
    dynnet.export(model, tmp_path / "stages")
    agree(Runner(tmp_path / "stages", threads=1), model, case.images(6))


def test_a_plain_model_is_one_stage(tmp_path: Path) -> None:
    plain = tiny()
    manifest = dynnet.export(plain, tmp_path / "plain", input_size=SIZE)
    assert len(manifest.stages) == 1
    assert manifest.stages[0].macs == manifest.dense_macs
    found = Runner(tmp_path / "plain", threads=1).predict(images().numpy())
    np.testing.assert_allclose(found.logits, plain(images()).detach().numpy(), rtol=0, atol=1e-5)
    assert (found.exit == 0).all()


@pytest.mark.sweep
def test_thresholds_can_be_changed(model: dynnet.DynamicModel, folder: Path, tmp_path: Path) -> None:
    runner, other = Runner(folder, threads=1), dynnet.wrap(tiny(), ["0", "1"], input_size=SIZE)
    for thresholds in ([-np.inf, np.inf], [np.inf, np.inf], [0.3, 0.3]):
        runner.thresholds = thresholds
        model_too = model.predict(images()).exit  # the model keeps its own
        expected = _exits(model, thresholds)
        assert (runner.predict(images().numpy()).exit == expected).all()
        assert (model.predict(images()).exit == model_too).all()
    with pytest.raises(ThresholdError, match="got 1 thresholds for 2 exits"):
        runner.thresholds = [0.5]
    other.thresholds = [np.inf, 0.5]
    dynnet.export(other, tmp_path / "one off")
    with pytest.raises(InputError, match="exit '0' was switched off when the model was exported, and has no stage"):
        Runner(tmp_path / "one off").thresholds = [0.5, 0.5]
    manifest = dynnet.export(other, tmp_path / "all", exits="all")
    assert [stage.exit for stage in manifest.stages] == [0, 1, 2]
    everybody = Runner(tmp_path / "all", threads=1)
    assert everybody.thresholds == (np.inf, 0.5)
    everybody.thresholds = [-np.inf, 0.5]
    assert (everybody.predict(images().numpy()).exit == 0).all()


def _exits(model: dynnet.DynamicModel, thresholds: Any) -> np.ndarray:
    kept = model.thresholds
    try:
        model.thresholds = thresholds
        return model.predict(images()).exit.numpy()
    finally:
        model.thresholds = kept


def test_neither_torch_nor_timm_is_needed(model: dynnet.DynamicModel, folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images().numpy())
    program = f"""
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "timm", "torchvision", "safetensors", "onnx", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import numpy as np
from dynnet.deploy import Runner
print(Runner({str(folder)!r}, threads=1).predict(np.load({str(tmp_path / "x.npy")!r})).exit.tolist())
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert json.loads(told) == model.predict(images()).exit.tolist()


@pytest.mark.sweep
def test_what_crosses_has_names_of_its_own(tmp_path: Path) -> None:
    case = Case("dla46x_c")  # in which a value inside of a stage would be named as one that it takes
    model = case.wrapped()
    leave_one_by_one(model, case.images(6))
    manifest = dynnet.export(model, tmp_path / "stages")
    assert manifest.stages[0].takes[0].name == "images"
    agree(Runner(tmp_path / "stages", threads=1), model, case.images(6))


class Turned(nn.Module):
    """To the last dimension, and back in another shape."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.back = back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2).reshape(x.shape[0], 2048) if self.back else x.permute(0, 2, 3, 1)


def test_views_of_what_crosses_need_not_stay_views(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), Turned(back=False))  # still laid out as it was before
    second = nn.Sequential(Turned(back=True), nn.Linear(2048, 4))
    model = dynnet.wrap(nn.Sequential(first, second).eval(), ["0"], input_size=SIZE)
    leave_one_by_one(model, images())
    dynnet.export(model, tmp_path / "stages")
    agree(Runner(tmp_path / "stages", threads=1), model, images())


class Windows(nn.Module):
    """Attention within windows, of five dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(x.shape[0], 2, 4, 16, 16)  # of (B, 8, 16, 16)
        return nn.functional.scaled_dot_product_attention(x, x, x).reshape(x.shape[0], 2048)


def test_attention_of_more_dimensions_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(Windows(), nn.Linear(2048, 4))
    model = dynnet.wrap(nn.Sequential(first, second).eval(), ["0"], input_size=SIZE)
    leave_one_by_one(model, images())
    dynnet.export(model, tmp_path / "stages")
    agree(Runner(tmp_path / "stages", threads=1), model, images())


def test_the_folder_says_how_to_run_it(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "    mean = (0.5, 0.5, 0.5)\n" in text
    assert "\n\n\n" not in text
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") and " = (" not in line)
    found: dict[str, Any] = {"images": images().numpy()}
    exec(block.replace("this folder", str(folder)), found)
    assert found["prediction"].logits.shape == (12, 4)


def test_threads_share_a_runner(folder: Path) -> None:
    runner = Runner(folder, threads=1)
    expected, found = runner.predict(images().numpy()), []

    def ask() -> None:
        found.extend(runner.predict(images().numpy()).logits for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(np.array_equal(logits, expected.logits) for logits in found)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3, 16, 16), np.float32), r"got shape \(2, 3, 16, 16\); give a numpy array"),
        (np.zeros((0, 3, 32, 32), np.float32), "of one image at least"),
        (np.zeros((1, 3, 32, 32)), "images are of float64; give float32"),
        (torch.zeros(1, 3, 32, 32), "images: got Tensor; give a numpy array"),
    ],
)
def test_wrong_images_are_told(folder: Path, x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Runner(folder, threads=1).predict(x)


def _altered(change: Any) -> Any:
    def alter(folder: Path) -> None:
        said = json.loads((folder / NAME).read_text())
        change(said)
        (folder / NAME).write_text(json.dumps(said))

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda folder: (folder / "stage_1.onnx").unlink(), "stage_1.onnx' is missing; export the model again"),
        (lambda folder: (folder / "stage_0.onnx").write_bytes(b"x"), "stage_0.onnx' .*its SHA-256"),
        (lambda folder: (folder / NAME).unlink(), "holds no exported model: manifest.json: No such file"),
        (lambda folder: (folder / NAME).write_text("{"), "is damaged: it is no JSON"),
        (_altered(lambda said: said.update(format=3)), "has format 3, this dynnet reads up to 2; upgrade dynnet"),
        (_altered(lambda said: said.update(engine="ort")), "unknown engine 'ort'.*choose from onnxruntime"),
        (_altered(lambda said: said["stages"].pop()), r"is damaged: stages end at exits \[0, 1\], of 2"),
        (_altered(lambda said: said["stages"][0]["gives"].clear()), "nothing gives .*, which stage_1.onnx takes"),
        (_altered(lambda said: said["stages"][0].update(file="../x")), "stage file '../x' is not in the folder"),
        (_altered(lambda said: said.update(thresholds=[0.5])), "1 thresholds for 2 exits"),
        (_altered(lambda said: said.pop("dtype")), "it lacks 'dtype'"),
    ],
)
def test_a_folder_that_was_changed_is_told(folder: Path, tmp_path: Path, alter: Any, message: str) -> None:
    copied = tmp_path / "stages"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    alter(copied)
    with pytest.raises(ExportError, match=message):
        Runner(copied, threads=1)


def test_what_cannot_be_exported_is_told_and_leaves_nothing(
    model: dynnet.DynamicModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[tuple[Any, dict[str, Any], str]] = [
        (model, {"engine": "tensorrt"}, "unknown engine 'tensorrt'; choose from onnxruntime"),
        (model, {"exits": "some"}, "exits='some': choose from running, all"),
        (tiny().half(), {"input_size": SIZE}, "the model is in torch.float16; export it in single precision"),
    ]
    for other, arguments, message in wanted:
        with pytest.raises(ExportError, match=message):
            dynnet.export(other, tmp_path / "x", **arguments)
    with pytest.raises(ExportError, match="is there already; remove it, or choose another folder"):
        dynnet.export(model, folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynnet.deploy.manifest.Manifest.write", full)
    with pytest.raises(ExportError, match="cannot write .*: No space left on device; make room for it"):
        dynnet.export(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_files_tell_nothing_of_where_they_were_made(folder: Path) -> None:
    for path in folder.iterdir():
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes(), path.name
        assert b"site-packages" not in path.read_bytes(), path.name


def test_threads_are_a_runners_own(model: dynnet.DynamicModel, folder: Path) -> None:
    for threads in (2, None, 1):
        agree(Runner(folder, threads=threads), model, images())


@pytest.mark.sweep
def test_residual_sums_stay_in_blocks_of_channels(tmp_path: Path) -> None:
    import onnx

    model = dynnet.wrap(timm.create_model("cifar_resnet20"), ["layer2.0"])  # layer2.1 adds what it takes
    model.thresholds = [0.5]
    dynnet.export(model, tmp_path / "stages")
    graph = onnx.load(tmp_path / "stages" / "stage_1.onnx").graph
    first, taken = graph.node[0], graph.input[0].name
    assert first.op_type == "AveragePool"
    assert [node.op_type for node in graph.node if taken in node.input] == ["AveragePool"]
    assert {node.op_type for node in graph.node if first.output[0] in node.input} == {"Conv", "Add"}
