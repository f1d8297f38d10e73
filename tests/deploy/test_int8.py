"""int8 on CPUs."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynnet
from dynnet.backbone.dry_run import trace
from dynnet.deploy.int8 import Int8Conv2d, Int8Layer, Int8Linear, int8_layers, put_int8_
from dynnet.errors import CheckpointError, DataError, NonFiniteError, QuantizeError
from tests.cases import CASES, Case, enliven, leave_one_by_one, tiny

NAMES = {"cifar_resnet20", "mobilenetv3_small_050", "test_efficientnet", "test_convnext", "test_vit", "regnetx_002"}
SOME = [case for case in CASES if case.name in NAMES]
MODULE = sys.modules[Int8Layer.__module__]  # `dynnet.quantize` is the function


def steps_of_inputs() -> int:
    """On this processor."""
    return MODULE._levels()


@pytest.mark.parametrize("case", SOME, ids=str)
@torch.no_grad()
def test_int8_answers_nearly_alike_for_the_same_macs(case: Case) -> None:
    model = case.backbone()
    enliven(model)
    images = case.images(6)
    small = dynnet.quantize(model, [(images,)])
    assert any(isinstance(m, Int8Layer) for m in small.modules())
    expected, got = model(images), small(images)
    # Without VNNI inputs have half as many steps, each twice as coarse.
    assert (got - expected).norm() < 0.05 * 255 / steps_of_inputs() * expected.norm()
    assert not torch.equal(got, expected)
    assert trace(small, case.size, 1).macs == trace(model, case.size, 1).macs
    assert torch.equal(copy.deepcopy(small)(images), got)


@pytest.mark.parametrize("groups", [1, 4])
@torch.no_grad()
def test_one_layer_is_right_to_its_steps(groups: int) -> None:
    conv = nn.Conv2d(8, 8, 3, 2, 1, groups=groups)
    x = torch.rand(2, 8, 9, 9) * 3 - 1
    small = Int8Conv2d(conv, -1.0, 2.0)
    bound = conv.weight.abs().flatten(1).sum(1).max() * 3 / 255 + 2 * conv.weight.abs().max() / 127 * 9 * 8
    assert (small(x) - conv(x)).abs().max() < bound / 2
    linear = nn.Linear(16, 5)
    x = torch.rand(2, 7, 16)
    assert (Int8Linear(linear, 0.0, 1.0)(x) - linear(x)).abs().max() < 0.05


@pytest.mark.parametrize("isa", ["AVX2", "ALL"])  # whatever of these the machine has
def test_sums_do_not_overflow(isa: str) -> None:
    code = (
        "import torch, dynnet; from torch import nn; "
        "m = nn.Sequential(nn.Conv2d(3, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval(); "
        "[nn.init.ones_(p) for p in m.parameters()]; x = torch.ones(4, 3, 8, 8); "
        "q = dynnet.quantize(m, [x], input_size=(3, 8, 8)); print(float((q(x) / m(x)).detach().mean()))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_half_as_many_steps_of_inputs_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    model, images = case.backbone(), case.images(6)
    enliven(model)

    def answers(steps: int) -> Tensor:
        monkeypatch.setattr(MODULE, "_levels", lambda: steps)
        return dynnet.quantize(model, [images])(images)

    expected, coarse = model(images), answers(127)
    assert not torch.equal(coarse, answers(255))  # whatever this processor makes of so many
    assert (coarse - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_forwards_that_ask_for_the_type_of_weights_get_that_of_what_they_compute() -> None:
    linear = nn.Linear(16, 5)
    small = Int8Linear(linear, 0.0, 1.0)
    assert small.weight.dtype == torch.float32
    assert torch.allclose(small.weight, linear.weight, atol=float(linear.weight.abs().max()) / 250)
    x = torch.rand(2, 16)
    for dtype in (torch.float16, torch.float64):
        found = copy.deepcopy(small).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        assert torch.allclose(found.float(), small(x), atol=0.01)


@torch.no_grad()
def test_a_dynamic_model_goes_on_deciding() -> None:
    model = CASES[0].wrapped()
    images = CASES[0].images(9)
    leave_one_by_one(model, images)
    before = model.predict(images)
    small = dynnet.quantize(model, [images])
    assert small.thresholds == model.thresholds
    after = small.predict(images)
    assert (after.exit == before.exit).sum() >= 5
    same = after.exit == before.exit
    assert torch.equal(after.macs[same], before.macs[same])
    assert any(isinstance(m, Int8Layer) for m in small.heads.modules())
    for quantized, told in ((small, "int8"), (model, "float32")):
        assert dynnet.latency(quantized, images[:2], warmup=0).setting["dtype"] == told


@pytest.mark.parametrize("case", SOME, ids=str)
@torch.no_grad()
def test_a_file_holds_it_pruned_or_not(case: Case, tmp_path: Path) -> None:
    create = {"model_name": case.name, "num_classes": 7, **case.kwargs}
    images = case.images(4)
    for model in (case.backbone(), dynnet.prune(case.backbone(), macs=0.6, criterion="l1", input_size=case.size)):
        enliven(model)
        small = dynnet.quantize(model, [images], input_size=case.size)
        dynnet.save(model, tmp_path / "float.safetensors", create)
        dynnet.save(small, tmp_path / "int8.safetensors", create)
        loaded = dynnet.load(tmp_path / "int8.safetensors")
        assert int8_layers(loaded) == int8_layers(small) != []
        assert torch.equal(loaded(images), small(images))
        sizes = [(tmp_path / f"{kind}.safetensors").stat().st_size for kind in ("float", "int8")]
        assert sizes[1] < 0.8 * sizes[0]


@torch.no_grad()
def test_a_file_holds_a_dynamic_model(tmp_path: Path) -> None:
    model, images = CASES[0].wrapped(), CASES[0].images(9)
    leave_one_by_one(model, images)
    small = dynnet.quantize(model, [images])
    dynnet.save(small, tmp_path / "x.safetensors", {"model_name": CASES[0].name, "num_classes": 7, **CASES[0].kwargs})
    for a, b in zip(dynnet.load(tmp_path / "x.safetensors").predict(images), small.predict(images), strict=True):
        assert torch.equal(a, b)


def test_a_file_for_another_backbone_is_refused(tmp_path: Path) -> None:
    dynnet.save(dynnet.quantize(tiny(), [torch.randn(2, 3, 32, 32)]), tmp_path / "x.safetensors")
    other = nn.Sequential(*tiny().children())
    other[1] = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
    with pytest.raises(CheckpointError, match=r"it has no batch norm '1\.1'"):
        dynnet.load(tmp_path / "x.safetensors", backbone=other)
    assert type(other[0][1]) is nn.BatchNorm2d  # untouched
    with pytest.raises(CheckpointError, match=r"it has no convolution or linear layer '1\.0'"):
        put_int8_(nn.Sequential(nn.ReLU()), {"1.0": (0.0, 1.0)})


def test_what_is_excluded_stays() -> None:
    small = dynnet.quantize(tiny(), [torch.randn(2, 3, 32, 32)], exclude=["0", "5"])
    kinds = [type(small.get_submodule(name)) for name in ("0.0", "1.0", "2.0", "5")]
    assert kinds == [nn.Conv2d, Int8Conv2d, Int8Conv2d, nn.Linear]


def test_bad_input() -> None:
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(QuantizeError, match="without gates"):
        dynnet.quantize(CASES[0].wrapped(gates="channel"), [images])
    with pytest.raises(QuantizeError, match=r"\.cpu\(\)\.float\(\)"):
        dynnet.quantize(tiny().double(), [images.double()])
    with pytest.raises(QuantizeError, match="in int8 already"):
        dynnet.quantize(dynnet.quantize(tiny(), [images]), [images])
    masked = tiny()
    dynnet.pruning.sparsify_(masked, 0.5, exclude=["0"])
    with pytest.raises(QuantizeError, match=r"1\.0 has a mask on its weights; call dynnet.pruning.make_permanent"):
        dynnet.quantize(masked, [images])
    with pytest.raises(QuantizeError, match="no module '9'"):
        dynnet.quantize(tiny(), [images], exclude=["9"])
    with pytest.raises(QuantizeError, match="no plain convolutions"):
        dynnet.quantize(nn.Sequential(nn.Flatten(), nn.PReLU()), [images])
    with pytest.raises(DataError, match="no batches"):
        dynnet.quantize(tiny(), [])
    with pytest.raises(NonFiniteError, match=r"0\.0 is given NaN"):
        dynnet.quantize(tiny(), [images * torch.nan])


@torch.no_grad()
def test_a_model_that_has_run_can_be_pickled_and_shared(tmp_path: Path) -> None:
    case = CASES[0]
    images = case.images(2)
    for model in (case.backbone(), case.wrapped()):
        small = dynnet.quantize(model, [images], input_size=case.size)
        expected = small(images)  # the kernels have their weights now
        torch.save(small, tmp_path / "model.pt")
        for copied in (
            pickle.loads(pickle.dumps(small)),
            torch.load(tmp_path / "model.pt", weights_only=False),
            copy.deepcopy(small),
            small.share_memory(),
        ):
            assert torch.equal(copied(images), expected)


@pytest.mark.sweep
@torch.no_grad()
def test_a_model_that_has_run_goes_to_another_process() -> None:
    images = CASES[0].images(2)
    small = dynnet.quantize(tiny(), [images], input_size=CASES[0].size)
    expected = small(images)
    processes = torch.multiprocessing.get_context("spawn")
    answers = processes.SimpleQueue()
    process = processes.Process(target=answer, args=(small, images, answers))
    process.start()
    got = answers.get()
    process.join()
    assert got == expected.tolist()


def answer(model: nn.Module, images: Tensor, answers: Any) -> None:
    """In a process of its own."""
    with torch.no_grad():
        answers.put(model(images).tolist())
