"""Gates on a backbone: put there, copied, saved, and refused where they cannot stand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import dynnet
from dynnet.errors import CheckpointError, ExitError, GateError, InputError
from dynnet.files.bundles import read_bundle, write_bundle
from dynnet.gates.plan import GateConfig
from tests.cases import Case, tiny
from tests.gates.gated import SMALL, difference, gated, predict_alone


def test_gates_work_wherever_the_model_is() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("cifar_resnet20")
    assert dynnet.wrap(backbone, [], gates="channel", input_size=SMALL.size).floor() > 0
    model = gated()
    model(SMALL.images(1))
    with pytest.raises(InputError, match="got images of torch.float32 for a model of torch.bfloat16"):
        model.to(torch.bfloat16)(SMALL.images(1))


def test_a_forward_of_the_users_own_is_not_overwritten() -> None:
    backbone = SMALL.backbone()
    backbone.layer1[0].conv1.forward = own = backbone.layer1[0].conv1.forward
    with pytest.raises(GateError, match="layer1.0.conv1 has a forward of its own, set on the instance"):
        dynnet.wrap(backbone, [], gates="channel", input_size=SMALL.size)
    assert backbone.layer1[0].conv1.forward is own
    dynnet.wrap(backbone, [], gates=GateConfig(exclude=("layer1.0",)), input_size=SMALL.size)


def test_gates_for_other_regions_are_refused(tmp_path: Path) -> None:
    model = gated()
    dynnet.save(model, tmp_path / "model.safetensors")
    tensors, about = read_bundle(tmp_path / "model.safetensors")
    about["regions"][0][0] = "layer1.1.conv1"
    write_bundle(tmp_path / "other.safetensors", tensors, about)
    given = SMALL.backbone()
    nn.init.constant_(given.conv1.weight, 0.5)
    with pytest.raises(CheckpointError, match="has gates for regions .*, here they would be"):
        dynnet.load(tmp_path / "other.safetensors", backbone=given)
    assert (given.conv1.weight == 0.5).all()
    dynnet.wrap(given, [], gates="channel")  # nothing is attached


def test_gates_of_other_widths_are_refused(tmp_path: Path) -> None:
    dynnet.save(gated(), tmp_path / "model.safetensors")
    wide = Case("cifar_resnet20", (3, 32, 32)).backbone()
    wide.layer1[0].conv1, wide.layer1[0].bn1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
    wide.layer1[0].conv2 = nn.Conv2d(24, 16, 3, padding=1, bias=False)
    with pytest.raises(
        CheckpointError, match=r"has gates for regions .*\(4, 4, 4\).*, here they would be .*\(6, 4, 4\)"
    ):
        dynnet.load(tmp_path / "model.safetensors", backbone=wide)


def test_folding_keeps_what_gates_decide() -> None:
    model, images = gated(exits=["layer2.0"]), SMALL.images(3)
    folded = dynnet.fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.backbone.modules())
    for ask in (dynnet.DynamicModel.predict, predict_alone):
        expected, found = ask(model, images), ask(folded, images)
        assert difference(found.logits, expected.logits) < 1e-4
        assert torch.equal(found.macs, expected.macs)


def test_gated_models_are_copied_and_keep_their_names() -> None:
    model, images = gated(exits=["layer2.0"]), SMALL.images(3)
    names = set(SMALL.backbone().state_dict())
    assert {k.removeprefix("backbone.") for k in model.state_dict() if k.startswith("backbone.")} == names
    twin = copy.deepcopy(model)
    expected = model(images)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(images), expected)


def test_a_gated_model_is_saved_and_loaded(tmp_path) -> None:
    model, images = gated(exits=["layer2.0"], unit=4), SMALL.images(3)
    model.thresholds = [0.3]
    path = tmp_path / "m.safetensors"
    dynnet.save(model, path, {"model_name": "cifar_resnet20", "num_classes": 7})
    loaded = dynnet.load(path)
    assert loaded.config == model.config
    assert torch.equal(loaded.predict(images).logits, model.predict(images).logits)
    assert torch.equal(loaded.predict(images).macs, model.predict(images).macs)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("channels", "gates='channels': give 'channel', 'width', a GateConfig, or None"),
        (GateConfig(unit=0), "unit=0: give a number of 1 or more"),
        (GateConfig(blocks=0), "blocks=0: give a number of 1 or more"),
        (GateConfig(exclude=("layer9",)), r"cifar_resnet20 has no module 'layer9'; did you mean 'layer\d'\?"),
        (GateConfig(exclude=("layer1", "layer2", "layer3")), "no channels to gate: .*excluded are"),
    ],
)
def test_impossible_gates_are_refused(gates: object, message: str) -> None:
    backbone = SMALL.backbone()
    with pytest.raises(GateError, match=message):
        dynnet.wrap(backbone, [], gates=gates, input_size=SMALL.size)
    assert not any("forward" in vars(m) for m in backbone.modules())


def test_a_model_without_anything_to_gate_says_why() -> None:
    with pytest.raises(GateError, match=r"test_mambaout has no channels to gate: .*split_with_sizes in stages"):
        dynnet.wrap(Case("test_mambaout", (3, 160, 160)).backbone(), [], gates="channel")
    with pytest.raises(GateError, match="Sequential has no channels to gate"):
        dynnet.wrap(tiny(), [], gates=GateConfig(exclude=("1", "2")), input_size=(3, 32, 32))


def test_a_gated_backbone_is_not_wrapped_twice() -> None:
    model = gated()
    with pytest.raises(ExitError, match="is wrapped already; call unwrap"):
        dynnet.wrap(model.backbone, [], gates="channel", input_size=SMALL.size)
    dynnet.wrap(model.unwrap(), [], gates="channel", input_size=SMALL.size)


def test_excluded_modules_are_left_alone() -> None:
    model = dynnet.wrap(SMALL.backbone(), [], gates=GateConfig(exclude=("layer1", "layer2.1")), input_size=SMALL.size)
    layers = {site.layer for site in model.gates.plan.sites}
    assert not any(name.startswith(("layer1.", "layer2.1.")) for name in layers)
    assert any(name.startswith("layer2.0.") for name in layers)
