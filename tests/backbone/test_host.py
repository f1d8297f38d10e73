"""A wrapped model answers what timm's tools ask of a backbone."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import dynnet
from dynnet.backbone.host import prepare_
from dynnet.errors import DynnetError, UnsupportedError
from tests.cases import CASES, FEW, tiny


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "cifar_resnet20", "test_convnext"])
def test_timms_tools_find_the_backbones_own_answers(name: str) -> None:
    backbone = timm.create_model(name)
    model = dynnet.wrap(backbone, 1)
    assert resolve_model_data_config(model) == resolve_model_data_config(backbone)
    for attribute in ("pretrained_cfg", "default_cfg", "num_features", "head_hidden_size", "feature_info"):
        assert getattr(model, attribute) is getattr(backbone, attribute)
    assert model.get_classifier() is backbone.get_classifier()
    assert model.num_classes == backbone.num_classes


@pytest.mark.parametrize("case", [c for c in CASES if hasattr(c.backbone(), "group_matcher")][::3], ids=str)
def test_parameters_are_grouped_by_depth_as_the_backbones_are(case) -> None:
    model = case.wrapped()
    bare = group_parameters(model.backbone, model.backbone.group_matcher(), reverse=True)
    ours = group_parameters(model, model.group_matcher(), reverse=True)
    assert {
        name.removeprefix("backbone."): depth for name, depth in ours.items() if name.startswith("backbone.")
    } == bare
    assert all(depth == max(ours.values()) for name, depth in ours.items() if name.startswith("heads."))


def test_a_backbone_whose_groups_are_a_function_is_grouped_by_it() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("cait_xxs24_224")
    bare = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    model = dynnet.wrap(backbone, 1)
    ours = group_parameters(model, model.group_matcher(), reverse=True)
    assert all(ours[f"backbone.{name}"] == depth for name, depth in bare.items())


def test_what_a_backbone_does_not_have_nobody_claims() -> None:
    model = dynnet.wrap(tiny(), 1, input_size=(3, 32, 32))
    for name in ("group_matcher", "get_classifier", "forward_features", "set_grad_checkpointing"):
        assert not hasattr(model, name)


def test_checkpointing_is_the_backbones() -> None:
    model = dynnet.wrap(timm.create_model("test_vit", img_size=64), 1)
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.backbone.grad_checkpointing


def test_frozen_batch_norms_stay_as_they_are() -> None:
    backbone = tiny().train()
    backbone[0][1].eval()
    model = dynnet.wrap(backbone, ["0"], input_size=(3, 32, 32))
    assert not backbone[0][1].training
    assert model.training
    assert model.heads[0].training
    assert backbone[1][1].training


def test_timms_optimisers_take_a_wrapped_model() -> None:
    optimizer = create_optimizer_v2(FEW[0].wrapped(), "sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2


@pytest.mark.parametrize("name", ["reset_classifier", "forward_features", "forward_head", "forward_intermediates"])
def test_what_cannot_be_kept_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"a wrapped model has no {name}\(\): .*backbone"):
        getattr(dynnet.wrap(timm.create_model("resnet18"), 1), name)(3)


def test_what_a_plain_backbone_does_not_say_is_not_made_up() -> None:
    model = dynnet.wrap(tiny(), 1, input_size=(3, 32, 32))
    assert not hasattr(model, "pretrained_cfg")
    assert model.class_names is None


def test_preparation_classes_and_thresholds_travel(tmp_path) -> None:
    case = FEW[0]
    model = case.wrapped()
    names = tuple(f"class {i}" for i in range(model.num_classes))
    prepare_(model.backbone, {"mean": (0.1, 0.2, 0.3), "input_size": case.size, "label_names": names})
    model.thresholds = [0.7, float("inf")]
    dynnet.save(model, tmp_path / "m.safetensors")
    other = case.wrapped()
    other.load_state_dict(model.state_dict())
    for same in (copy.deepcopy(model), dynnet.load(tmp_path / "m.safetensors"), other, dynnet.fold(model)):
        assert same.thresholds == (0.7, float("inf"))
        assert same.class_names == names
        assert resolve_model_data_config(same)["mean"] == (0.1, 0.2, 0.3)
    dynnet.save(model.unwrap(), tmp_path / "b.safetensors")
    assert dynnet.load(tmp_path / "b.safetensors").pretrained_cfg["label_names"] == names


def test_a_state_of_other_exits_is_refused() -> None:
    one, two = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32)), dynnet.wrap(tiny(), ["1"], input_size=(3, 32, 32))
    state = {**one.state_dict(), "_extra_state": case_state(3)}
    with pytest.raises((DynnetError, RuntimeError), match="3 thresholds for 1 exits"):
        two.load_state_dict(state, strict=False)


def test_a_state_without_thresholds_leaves_them_and_says_so() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    model.thresholds = [0.5]
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "_extra_state"}
    with pytest.warns(UserWarning, match="has no thresholds: they stay as they are"):
        model.load_state_dict(state)
    assert model.thresholds == (0.5,)


def test_thresholds_may_change_while_weights_are_averaged() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    ema = ModelEmaV3(model)
    dynnet.calibrate(model, [(torch.randn(12, 3, 32, 32), torch.zeros(12, dtype=torch.long))], budget=0.9)
    ema.update(model, step=1)


def case_state(exits: int) -> torch.Tensor:
    """What a model with so many exits says of itself."""
    return torch.frombuffer(
        bytearray(b'{"thresholds": %s, "calibration": null, "preparation": {}}' % str([0.5] * exits).encode()),
        dtype=torch.uint8,
    )
