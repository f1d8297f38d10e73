"""int8 on CPUs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import dynnet
from dynnet.errors import CheckpointError, DataError, NonFiniteError, QuantizeError
from dynnet.probe import trace
from dynnet.quantize import Int8Conv2d, Int8Layer, Int8Linear
from tests.cases import CASES, Case, enliven, leave_one_by_one, tiny

NAMES = {"cifar_resnet20", "mobilenetv3_small_050", "test_efficientnet", "test_convnext", "test_vit", "regnetx_002"}
SOME = [case for case in CASES if case.name in NAMES]


@pytest.mark.parametrize("case", SOME, ids=str)
@torch.no_grad()
def test_int8_answers_nearly_alike_for_the_same_macs(case: Case) -> None:
    model = case.backbone()
    enliven(model)
    images = case.images(6)
    small = dynnet.quantize(model, [(images,)])
    assert any(isinstance(m, Int8Layer) for m in small.modules())
    expected, got = model(images), small(images)
    assert (got - expected).norm() < 0.05 * expected.norm()
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


def test_what_is_excluded_stays() -> None:
    small = dynnet.quantize(tiny(), [torch.randn(2, 3, 32, 32)], exclude=["0", "5"])
    kinds = [type(small.get_submodule(name)) for name in ("0.0", "1.0", "2.0", "5")]
    assert kinds == [nn.Conv2d, Int8Conv2d, Int8Conv2d, nn.Linear]


def test_bad_input(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(QuantizeError, match="without gates"):
        dynnet.quantize(CASES[0].wrapped(gates="channel"), [images])
    with pytest.raises(QuantizeError, match=r"\.cpu\(\)\.float\(\)"):
        dynnet.quantize(tiny().double(), [images.double()])
    with pytest.raises(QuantizeError, match="no module '9'"):
        dynnet.quantize(tiny(), [images], exclude=["9"])
    with pytest.raises(QuantizeError, match="no plain convolutions"):
        dynnet.quantize(nn.Sequential(nn.Flatten(), nn.PReLU()), [images])
    with pytest.raises(CheckpointError, match="save the model that it is of"):
        dynnet.save(dynnet.quantize(tiny(), [images]), tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="no batches"):
        dynnet.quantize(tiny(), [])
    with pytest.raises(NonFiniteError, match=r"0\.0 is given NaN"):
        dynnet.quantize(tiny(), [images * torch.nan])
