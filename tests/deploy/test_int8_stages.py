"""Exported stages in int8 answer nearly as in float, and leave as often."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import dynnet
from dynnet.deploy import Runner, quantizing
from dynnet.deploy.engines import onnxruntime_int8
from dynnet.deploy.quantizing import in_int8, same_shares
from dynnet.errors import DataError, ExportError
from tests.cases import CASES, leave_one_by_one, tiny
from tests.exported import SIZE, two_exits


def images(count: int, seed: int = 1) -> torch.Tensor:
    """Of different brightness and contrast, so that even a random model tells them apart."""
    draw = torch.Generator().manual_seed(seed)
    scale, shift = torch.rand(2, count, 3, 1, 1, generator=draw) * 2
    return torch.randn(count, *SIZE, generator=draw) * scale + shift - 1


def loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images(50, seed), torch.zeros(50)) for seed in range(2, 8)]


@pytest.fixture(scope="module")
def model() -> dynnet.DynamicModel:
    return two_exits(images(300))


@pytest.fixture(scope="module")
def folder(model: dynnet.DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "stages"
    dynnet.export(model, path, int8=True, loader=loader())
    return path


@pytest.fixture(scope="module")
def in_float(model: dynnet.DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "stages"
    dynnet.export(model, path)
    return path


def test_int8_answers_as_float_does_and_leaves_as_often(folder: Path, in_float: Path) -> None:
    x = images(400).numpy()
    exact, coarse = Runner(in_float, threads=1), Runner(folder, threads=1)
    said = coarse.manifest
    assert (said.precision, exact.manifest.precision) == ("int8", "float32")
    assert exact.manifest.quantized is None
    assert said.quantized is not None
    assert said.quantized.float_thresholds == exact.manifest.thresholds
    assert (said.quantized.range_images, said.quantized.images) == (256, 300)
    assert said.quantized.agreement > 0.85
    before, after = exact.predict(x), coarse.predict(x)
    assert (before.logits.argmax(1) == after.logits.argmax(1)).mean() > 0.85
    for number in range(3):
        assert abs((before.exit == number).mean() - (after.exit == number).mean()) < 0.05
    assert set(after.macs) == set(before.macs)
    assert not np.array_equal(before.logits, after.logits)
    alone = coarse.predict(x[7:8])
    np.testing.assert_allclose(alone.logits[0], after.logits[7], rtol=0, atol=1e-5)


def test_weights_are_bytes_that_cannot_overflow(folder: Path) -> None:
    found = 0
    for number in range(3):
        graph = onnx.load(folder / f"stage_{number}.onnx").graph
        held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        makers = {name: node for node in graph.node for name in node.output}
        for node in (node for node in graph.node if node.op_type == "Conv"):
            if node.input[1] in held:  # in float: the first, which reads the images
                assert node.input[0] == graph.input[0].name
                continue
            weight = held[makers[node.input[1]].input[0]]
            assert weight.dtype == np.int8
            assert np.abs(weight.astype(int)).max() > 64  # more than 7 bits
            for order in (weight, np.moveaxis(weight, 1, -1)):
                row = order.reshape(len(weight), -1).astype(int)
                for part in (np.maximum(row, 0), np.maximum(-row, 0)):
                    assert 255 * (part[:, 1:] + part[:, :-1]).max() < 2**15  # what kernels add in 16 bits
            found += 1
        last = next(node for node in graph.node if "logits" in node.output)
        assert last.input[1] in held
        assert held[last.input[1]].dtype == np.float32
    assert found == 2


def test_files_in_int8_tell_nothing_of_where_they_were_made(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "manifest.json", "stage_0.onnx", "stage_1.onnx", "stage_2.onnx",
    ]  # fmt: skip
    for path in folder.iterdir():
        for told in (str(Path(__file__).parents[2]), "site-packages", str(folder.parent)):
            assert told.encode() not in path.read_bytes(), (path.name, told)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_families_in_int8(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.wrapped([0.4])
    leave_one_by_one(model, case.images(6))
    dynnet.export(model, tmp_path / "float")
    manifest = dynnet.export(model, tmp_path / "int8", int8=True, loader=[case.images(40)])
    assert manifest.quantized is not None
    x = case.images(8).numpy()
    both = [Runner(tmp_path / kind, threads=1) for kind in ("float", "int8")]
    for runner in both:
        runner.thresholds = [math.inf]
    exact, coarse = (runner.predict(x).logits for runner in both)
    assert np.linalg.norm(exact - coarse) < 0.15 * np.linalg.norm(exact)


def test_shares_that_leave_stay() -> None:
    draw = np.random.default_rng(0)
    before = draw.random((1000, 3))
    after = np.clip(before * 0.8 + draw.normal(0, 0.01, before.shape), 0, 1)
    found = same_shares(before, after, [0.7, 0.5])
    assert found == pytest.approx((0.56, 0.4), abs=0.01)
    here = np.ones(1000, bool), np.ones(1000, bool)
    for exit, (old, new) in enumerate(zip([0.7, 0.5], found, strict=True)):
        gone = here[0] & (before[:, exit] >= old), here[1] & (after[:, exit] >= new)
        assert abs(int(gone[0].sum()) - int(gone[1].sum())) <= 1
        here = here[0] & ~gone[0], here[1] & ~gone[1]


@pytest.mark.parametrize(
    ("before", "after", "threshold", "expected"),
    [
        ([0.9, 0.8, 0.7], [0.1, 0.2, 0.3], math.inf, math.inf),
        ([0.9, 0.8, 0.7], [0.1, 0.2, 0.3], -math.inf, -math.inf),
        ([0.9, 0.8, 0.7], [0.9, 0.8, 0.6], 0.95, 0.95),  # nobody leaves, and nobody would
        ([0.9, 0.8, 0.7], [0.99, 0.8, 0.6], 0.95, math.nextafter(0.99, 2)),
        ([0.9, 0.8, 0.7], [0.9, 0.8, 0.6], 0.5, 0.5),  # all leave, and all would
        ([0.9, 0.8, 0.7], [0.9, 0.8, 0.4], 0.5, 0.4),
        ([0.9, 0.8, 0.7], [0.5, 1.0, 1.0], 0.75, 0.75),  # two that are equally sure leave together
        ([0.9, 0.8, 0.7], [0.5, 1.0, 1.0], 0.85, math.nextafter(1, 2)),  # or stay: none is as near to one as two
        ([0.9, math.nan, 0.7], [math.nan, 0.8, 0.6], 0.8, 0.7),
        ([0.9, 0.8], [math.nan, math.nan], 0.85, 0.85),
    ],
)
def test_thresholds_at_the_edges(before: list[float], after: list[float], threshold: float, expected: float) -> None:
    (found,) = same_shares(np.array(before)[:, None], np.array(after)[:, None], [threshold])
    assert found == pytest.approx(expected, rel=1e-12)


def test_an_exit_that_nobody_reaches_keeps_its_threshold() -> None:
    draw = np.random.default_rng(0).random((20, 2))
    assert same_shares(draw, draw, [-math.inf, 0.3]) == (-math.inf, 0.3)


def test_exits_that_are_off_stay_off(tmp_path: Path) -> None:
    off = dynnet.wrap(tiny(), ["0"], input_size=SIZE)
    manifest = dynnet.export(off, tmp_path / "off", int8=True, loader=loader(), exits="all")
    assert manifest.thresholds == ("inf",)
    assert len(manifest.stages) == 2


def test_votes_keep_their_thresholds(tmp_path: Path) -> None:
    voting = dynnet.wrap(tiny(), ["0"], input_size=SIZE, confidence="patience")
    voting.thresholds = [0.5]
    manifest = dynnet.export(voting, tmp_path / "votes", int8=True, loader=loader())
    assert manifest.thresholds == (0.5,)


def test_a_certificate_does_not_outlast_int8(folder: Path) -> None:
    read = Runner(folder, threads=1).manifest
    certified = replace(read, calibration={"goal": "risk", "certificate": {"risk": 0.01}})
    assert read.quantized is not None
    said = in_int8(certified, [0.5, math.inf], read.quantized).calibration
    assert said is not None
    assert said["goal"] == "risk"
    assert said["certificate"] is None
    assert "does not hold in int8" in str(said["void"])
    assert in_int8(read, [0.5, math.inf], read.quantized).thresholds == (0.5, "inf")


def _once() -> Iterator[torch.Tensor]:
    yield images(8)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, ExportError, "int8 measures the range of every tensor; give images like those to come, as loader="),
        (_once(), ExportError, "the loader is an iterator, and is gone through twice; give a DataLoader, or a list"),
        ([], DataError, "the loader gave no batches; give it at least one image"),
        ([{"image": 0}], DataError, "batch 0 of the loader is a dictionary; give images, or"),
        ([torch.zeros(2, 3, 8, 8)], ExportError, r"have shape \(2, 3, 8, 8\); give batches \(B, C, H, W\) of \(3, 32"),
        ([torch.full((2, *SIZE), math.nan)], ExportError, "batch 0 of the loader holds NaN or infinity; check how"),
    ],
)
def test_what_ranges_cannot_be_measured_on_is_told(
    model: dynnet.DynamicModel, tmp_path: Path, given: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dynnet.export(model, tmp_path / "x", int8=True, loader=given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sweep
def test_answers_of_another_model_are_refused(
    model: dynnet.DynamicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "_NONSENSE", 1.1)
    with pytest.raises(ExportError, match=r"in int8 only \d+% of 300 images get the class that they get in float"):
        dynnet.export(model, tmp_path / "x", int8=True, loader=loader())
    assert list(tmp_path.iterdir()) == []


def test_ranges_are_measured_on_images_from_all_over_the_loader(model: dynnet.DynamicModel) -> None:
    batches = [torch.full((100, *SIZE), float(number)) for number in range(10)]
    chosen = quantizing.Calibrating(model, batches).sample
    counts = np.bincount(chosen[:, 0, 0, 0].astype(int), minlength=10)
    assert len(chosen) == 256
    assert counts.min() > 10


def test_a_stage_is_shown_those_that_reach_it_and_want_its_width() -> None:
    confidences, widths = np.zeros((200, 3)), np.zeros((200, 3), int)
    confidences[:100, 0] = confidences[100:150, 1] = 1
    widths[:180, 1], widths[:, 2] = 1, 2
    said = quantizing.Said(np.zeros((200, 3), int), confidences, widths)
    reached = [quantizing._reached(said, [0.5, 0.5], step, None) for step in range(3)]
    assert [len(rows) for rows in reached] == [200, 100, 200]  # 50 are too few
    assert reached[1].tolist() == list(range(100, 200))
    assert quantizing._reached(said, [0.5, 0.5], 1, 1).tolist() == list(range(100, 180))
    assert quantizing._reached(said, [0.5, 0.5], 1, 0).tolist() == list(range(100, 200))  # 20 are too few
    assert len(quantizing._reached(said, [0.5, 0.5], 2, 2)) == 200


def test_means_of_one_pixel_are_left_out() -> None:
    """They bring features into blocks of channels, for kernels of floats."""
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("AveragePool", ["x"], ["same"], kernel_shape=[1, 1]),
            node("AveragePool", ["same"], ["mean"], kernel_shape=[2, 2]),
            node("Add", ["mean", "same"], ["y"]),
        ],
        "graph",
        [value("x", onnx.TensorProto.FLOAT, None)],
        [value("y", onnx.TensorProto.FLOAT, None)],
    )
    onnxruntime_int8._without_means_of_one_pixel(graph)
    assert [(node.op_type, list(node.input)) for node in graph.node] == [
        ("AveragePool", ["x"]),
        ("Add", ["mean", "x"]),
    ]


def test_weights_that_are_all_zero_have_a_step() -> None:
    assert onnxruntime_int8.reach(np.zeros((2, 3, 3, 3), np.float32)).tolist() == [1, 1]
    assert onnxruntime_int8.reach(np.full((1, 1, 3, 3), -2, np.float32)).tolist() == [2]  # depthwise
    assert onnxruntime_int8.reach(np.full((1, 2, 1, 1), -2, np.float32)).tolist() == [4]
