"""Models in files."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import dynnet
from dynnet.errors import CheckpointError
from dynnet.exits import flow
from dynnet.exits.boundaries import Boundary
from dynnet.files import bundles as bundle
from tests.cases import CLASSES, FEW, Case, enliven, leave_one_by_one, tiny


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_model_comes_back_whole(case: Case, tmp_path: Path) -> None:
    model = case.wrapped(head_share=0.03)
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(torch.randn_like(p) / 10)
    leave_one_by_one(model, case.images())
    dynnet.save(model, tmp_path / "m.safetensors", {"model_name": case.name, "num_classes": 7, **case.kwargs})
    loaded = dynnet.load(tmp_path / "m.safetensors")
    assert loaded.thresholds == model.thresholds
    assert loaded.config == model.config
    assert not loaded.training
    for a, b in zip(loaded.predict(case.images()), model.predict(case.images()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gates", [None, "channel"])
@pytest.mark.parametrize("case", [FEW[0], FEW[2]], ids=str)
@torch.no_grad()
def test_a_folded_model_comes_back_whole(case: Case, gates: str | None, tmp_path: Path) -> None:
    model = case.wrapped(gates=gates)
    enliven(model)
    leave_one_by_one(model, case.images())
    folded = dynnet.fold(model)
    dynnet.save(folded, tmp_path / "m.safetensors", {"model_name": case.name, "num_classes": 7, **case.kwargs})
    loaded = dynnet.load(tmp_path / "m.safetensors")
    for a, b in zip(loaded.predict(case.images()), folded.predict(case.images()), strict=True):
        assert torch.equal(a, b)


def test_calibration_and_infinite_thresholds_survive(tmp_path: Path) -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    model.thresholds = [float("inf"), -float("inf")]
    model.calibration = {"goal": "budget", "value": 0.5}
    dynnet.save(model, tmp_path / "m.safetensors")
    loaded = dynnet.load(tmp_path / "m.safetensors", backbone=tiny())
    assert loaded.thresholds == model.thresholds
    assert loaded.calibration == model.calibration


def test_files_of_other_kinds_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint '.*nothing'"):
        dynnet.load(tmp_path / "nothing")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not one of dynnet's"):
        dynnet.load(tmp_path / "plain")
    bundle.write_bundle(tmp_path / "state", {"x": torch.zeros(2)}, {"kind": "state"})
    with pytest.raises(CheckpointError, match="holds a state, not a model"):
        dynnet.load(tmp_path / "state")
    bundle.write_bundle(tmp_path / "early", {"x": torch.zeros(2)}, {"kind": "backbone", "model_name": "resnet18"})
    with pytest.raises(CheckpointError, match="does not say how to build its backbone"):
        dynnet.load(tmp_path / "early")


def test_another_backbone_is_refused_and_left_alone(saved: Path) -> None:
    wide = timm.create_model("cifar_resnet20", num_classes=7, width=2.0)
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    with pytest.raises(CheckpointError, match="is of another model: .* has shape"):
        dynnet.load(saved, backbone=wide)
    assert all(torch.equal(v, before[k]) for k, v in wide.state_dict().items())
    assert not flow.is_attached(wide)
    with pytest.raises(CheckpointError, match="does not fit the given backbone: no boundary 'layer1' in Sequential"):
        dynnet.load(saved, backbone=tiny())


def test_a_backbone_that_a_pruned_file_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    case = FEW[0]
    thin = dynnet.prune(case.backbone(), macs=0.5, criterion="l2", multiple=1, input_size=case.size)
    dynnet.save(thin, tmp_path / "thin.safetensors", {"model_name": case.name, "num_classes": CLASSES, **case.kwargs})
    wanted = {"cifar_resnet56": "is of another model", case.name: r"its 'fc' makes and reads \[8, 64\] channels"}
    for name, classes in (("cifar_resnet56", CLASSES), (case.name, CLASSES + 1)):
        other = timm.create_model(name, num_classes=classes, **case.kwargs).eval()
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CheckpointError, match=wanted[name]):
            dynnet.load(tmp_path / "thin.safetensors", other)
        assert other.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_what_a_pruned_dynamic_model_lacks_leaves_the_backbone_alone(tmp_path: Path) -> None:
    case = FEW[0]
    thin = dynnet.prune(case.backbone(), macs=0.5, criterion="l2", multiple=1, input_size=case.size)
    model = dynnet.wrap(thin, 1, input_size=case.size, confidence=lambda x: x.amax(1))
    dynnet.save(model, tmp_path / "m.safetensors", {"model_name": case.name, "num_classes": CLASSES, **case.kwargs})
    given = case.backbone()
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(CheckpointError, match="pass it as confidence="):
        dynnet.load(tmp_path / "m.safetensors", given)
    with pytest.raises(CheckpointError, match="does not fit the given backbone: .*head"):
        dynnet.load(tmp_path / "m.safetensors", given, heads=lambda *_: torch.nn.Flatten(), confidence=len)
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())
    assert not flow.is_attached(given)


def test_widths_that_timm_would_not_build_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    wide = timm.create_model("cifar_resnet20", width=2.0, num_classes=4).eval()
    with pytest.warns(UserWarning, match="makes another model than this cifar_resnet20: its 'conv1' makes and reads"):
        dynnet.save(wide, path)
    again = dynnet.load(path, timm.create_model("cifar_resnet20", width=2.0, num_classes=4))
    assert torch.equal(again.conv1.weight, wide.conv1.weight)


def test_what_timm_would_build_otherwise_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    silu = timm.create_model("resnet18", act_layer="silu", num_classes=4).eval()
    with pytest.warns(UserWarning, match="makes another model than this resnet18: 'act1' is a SiLU, there a ReLU"):
        dynnet.save(silu, path)
    with pytest.raises(CheckpointError, match="timm cannot create the backbone .* pass it as backbone="):
        dynnet.load(path)
    images = torch.randn(2, 3, 64, 64)
    again = dynnet.load(path, timm.create_model("resnet18", act_layer="silu", num_classes=4))
    assert torch.equal(again(images), silu(images))
    dynnet.save(silu, path, {"model_name": "resnet18", "act_layer": "silu", "num_classes": 4})
    assert torch.equal(dynnet.load(path)(images), silu(images))
    dynnet.save(timm.create_model("resnet18", drop_rate=0.1, num_classes=4), path)  # dropout is no difference


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet18", {"output_stride": 8}, "'layer3.0' has stride=1, there 2"),
        ("resnet18", {"norm_layer": partial(nn.BatchNorm2d, eps=0.1)}, "'bn1' has eps=0.1, there 1e-05"),
        ("test_vit", {"img_size": 64}, r"'pos_embed' has shape \(1, 17, 64\), there \(1, 101, 64\)"),
        ("test_vit", {"norm_layer": partial(timm.layers.LayerNorm, eps=0.1)}, "has eps=0.1, there 1e-06"),
    ],
)
def test_settings_that_timm_would_choose_otherwise_are_told(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = timm.create_model(name, num_classes=4, **settings)
    with pytest.warns(UserWarning, match=message):
        dynnet.save(model, tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = timm.create_model("cifar_resnet20", num_classes=4).to(dtype).eval()
    dynnet.save(model, path)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    again = dynnet.load(path)
    assert torch.equal(again(images), model(images))
    assert again.conv1.weight.requires_grad
    dynnet.save(dynnet.wrap(model, 1), path)
    assert torch.equal(dynnet.load(path)(images), model(images))
    given = timm.create_model("cifar_resnet20", num_classes=4)
    assert dynnet.load(path, given).backbone.conv1.weight.dtype == torch.float32  # as it was


def test_the_tag_of_pretrained_weights_is_kept(tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_large_100.miil_in21k_ft_in1k", num_classes=4)
    dynnet.save(model, tmp_path / "m.safetensors")
    again = dynnet.load(tmp_path / "m.safetensors")
    assert again.pretrained_cfg["mean"] == model.pretrained_cfg["mean"] == (0.0, 0.0, 0.0)


def test_masks_are_not_loaded_over(tmp_path: Path) -> None:
    dynnet.save(timm.create_model("cifar_resnet20"), tmp_path / "m.safetensors")
    masked = timm.create_model("cifar_resnet20")
    dynnet.pruning.sparsify_(masked, 0.5)
    with pytest.raises(CheckpointError, match=r"given backbone: conv1 has a mask .*make_permanent"):
        dynnet.load(tmp_path / "m.safetensors", masked)


def test_unknown_backbones_and_custom_parts_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = dynnet.wrap(tiny(), ["1"], input_size=(3, 32, 32))
    dynnet.save(model, path)
    with pytest.raises(CheckpointError, match="timm cannot create the backbone .* pass it as backbone="):
        dynnet.load(path)

    def factory(boundary: Boundary, k: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, k))

    mine = dynnet.wrap(tiny(), ["1"], input_size=(3, 32, 32), heads=factory, confidence=lambda x: x.amax(1))
    dynnet.save(mine, path)
    with pytest.raises(CheckpointError, match="has heads of its own making; pass the factory as heads="):
        dynnet.load(path, backbone=tiny())
    with pytest.raises(CheckpointError, match="has a confidence measure of its own, .*; pass it as confidence="):
        dynnet.load(path, backbone=tiny(), heads=factory)
    x = torch.randn(4, 3, 32, 32)
    mine.thresholds = [float(mine.forward_exits(x).logits[0].detach().amax(1).median())]
    dynnet.save(mine, path)
    loaded = dynnet.load(path, backbone=tiny(), heads=factory, confidence=lambda x: x.amax(1))
    assert torch.equal(loaded.predict(x).exit, mine.predict(x).exit)


def test_a_backbone_with_a_classifier_of_its_own_is_written(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=4).eval()
    model.fc = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(512, 4))
    with pytest.warns(UserWarning, match="'fc' is a Sequential, there a Linear"):
        dynnet.save(model, tmp_path / "m.safetensors")
    other = timm.create_model("resnet18", num_classes=4)
    other.fc = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(512, 4))
    loaded = dynnet.load(tmp_path / "m.safetensors", backbone=other)
    assert torch.equal(loaded.fc[1].weight, model.fc[1].weight)
