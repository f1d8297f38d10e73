"""A file is only data: whoever made it, loading it asks nobody, opens nothing else and takes no more than it holds."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import dynnet
from dynnet.errors import CheckpointError
from dynnet.files.creation import not_architecture
from tests.cases import CLASSES, FEW, Case
from tests.files.resigned import resign
from tests.watching import watched


def refused(path: Path, match: str) -> None:
    """Refused with these words, at once, without a look elsewhere, and without memory."""
    memory, began = _peak(), time.monotonic()
    with watched() as seen, pytest.raises(CheckpointError, match=match) as raised:
        dynnet.load(path)
    assert repr(str(path)) in str(raised.value)
    assert seen == []
    assert _peak() - memory < 500e6
    assert time.monotonic() - began < 30


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pretrained", True),
        ("checkpoint_path", "/etc/passwd"),
        ("pretrained_cfg", {"url": "http://localhost/x.pth"}),
        ("pretrained_cfg", "a1_in1k"),
        ("pretrained_cfg_overlay", {"file": "/etc/passwd"}),
        ("cache_dir", "/tmp"),
        ("pretrained_model_args", {"x": 1}),
        ("features_only", True),
        ("pruned", True),
        ("norm_layer", {"a": 1}),
        ("act_layer", "x" * 1000),
    ],
)
def test_a_file_says_an_architecture_and_no_more(saved: Path, key: str, value: Any) -> None:
    resign(saved, lambda _, about: about["create"].update({key: value}))
    refused(saved, rf"says of its model what cannot be: create: .*'?{key}")
    with pytest.raises(CheckpointError, match=f"{key}.*give what makes the architecture"):
        dynnet.save(FEW[0].backbone(), saved, {"model_name": FEW[0].name, key: value})


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/etc", "../resnet18", "resnet18.a/b", 7])
def test_a_file_names_what_timm_has_registered(saved: Path, name: Any) -> None:
    resign(saved, lambda _, about: about["create"].update(model_name=name))
    refused(saved, "timm has no model")


def test_what_is_an_architecture() -> None:
    wanted = {"model_name": "resnet18.a1_in1k", "num_classes": None, "layers": (2, 2, 2, 2), "act_layer": "silu"}
    assert not_architecture(wanted) is None
    assert not_architecture({**wanted, "layers": [[[[2]]]]}) is not None
    assert not_architecture({**wanted, "width": 1e300}) is not None


def _stated(values: dict[str, Any]) -> Any:
    return lambda _, about: about["shape"].update(stated={"": values})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"forward": "x"}, r"shape.stated\.\.forward is 'x'; expected a whole number"),
        ({"training": True}, "expected a whole number"),
        ({"training": 1}, "states no 'training' of 1 channels or more"),
        ({"num_features": 65}, "states no 'num_features' of 65 channels or more"),
        ({"num_features": -1}, "states no 'num_features' of -1 channels or more"),
    ],
)
def test_a_file_sets_widths_and_nothing_else(saved: Path, values: dict[str, Any], match: str) -> None:
    resign(saved, _stated(values))
    refused(saved, match)


def _packed(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors |= {"bomb.bits": torch.zeros(8, dtype=torch.uint8), "bomb.values": torch.zeros(0)}
    about["packed"] = {"bomb": [2**31, 2**31]}


def _exits(_: dict[str, Tensor], about: dict[str, Any]) -> None:
    about["wrap"]["exits"] = 10**9


def _create(**arguments: Any) -> Any:
    return lambda _, about: about["create"].update(arguments)


def _blocks(_: dict[str, Tensor], about: dict[str, Any]) -> None:
    about["create"] = {"model_name": "resnet18", "layers": [60_000] * 4, "num_classes": 7}


def _windows(_: dict[str, Tensor], about: dict[str, Any]) -> None:
    about["create"] = {"model_name": "swin_tiny_patch4_window7_224", "img_size": 56_000, "num_classes": 7}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_packed, "the bits and the values of 'bomb' do not fit its shape"),
        (_exits, "wrap.exits is 1000000000; expected a list"),
        (_create(width=100), r"is of another model: .* has shape|it has more than"),
        (_create(width=20_000), "it has more than Most"),
        (_create(num_classes=1_000_000), "is of another model: 'fc.weight' has shape|it has more than"),
        (_blocks, "it has more than Most"),
        (_windows, "it has more than Most"),
    ],
    ids=["packed", "exits", "width", "great width", "classes", "blocks", "windows"],
)
def test_what_is_only_declared_takes_no_memory(saved: Path, change: Any, match: str) -> None:
    resign(saved, change)
    refused(saved, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _, about: about.update(thresholds=[0.5]), "it has 1 thresholds for 2 exits"),
        (lambda _, about: about.update(thresholds=[float("1e400"), 0.5]), "Infinity is no number of JSON"),
        (lambda _, about: about.update(colour="red"), "unknown key 'colour'; it has kind"),
        (lambda _, about: about["wrap"].pop("head_share"), "wrap lacks 'head_share'"),
        (lambda _, about: about["wrap"].update(input_size=[3, 32, 10**9]), r"wrap.input_size\[2\] is 1000000000"),
        (lambda _, about: about["shape"].update(removed=["layer1", "layer1.0"]), "cannot be left out by itself"),
        (lambda _, about: about["shape"].update(widths={"fc": [0, 64]}), "'fc' makes and reads"),
        (lambda _, about: about["shape"].update(widths={"fc": [7]}), "'fc' makes and reads"),
        (lambda _, about: about.update(wrap=None, thresholds=[]), "it is a model without 'wrap'"),
        (lambda _, about: about.update(preparation={"mean": "red"}), "preparation.mean is 'red'; expected a list"),
        (
            lambda tensors, _: tensors.update({"backbone.conv1.weight": torch.zeros(3)}),
            r"conv1.weight' has shape \(3,\)",
        ),
        (lambda tensors, _: tensors.update({"backbone.fc.bias": torch.zeros(7).int()}), "fc.bias' is of torch.int32"),
        (lambda tensors, _: tensors.pop("backbone.fc.bias"), "it lacks 'fc.bias'"),
        (lambda tensors, _: tensors.pop("heads.0.classifier.bias"), "lacks 1 tensors"),
    ],
)
def test_what_does_not_fit_is_told(saved: Path, change: Any, match: str) -> None:
    resign(saved, change)
    refused(saved, match)


@pytest.mark.parametrize(
    ("settings", "create", "message"),
    [
        ({"num_heads": 4}, {}, "states no 'num_heads' of 4"),
        ({"num_heads": 1}, {}, "the forward of .* itself raised|differs by up to"),
        ({"global_pool": "avg", "pool_include_prefix": True}, {"global_pool": "avg"}, "an image differs by up to"),
    ],
)
def test_what_changes_no_tensor_is_told(
    settings: dict[str, Any], create: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, name = tmp_path / "m.safetensors", {"model_name": "test_vit", "num_classes": CLASSES}
    model = timm.create_model(**name, **settings).eval()
    for saved in (model, dynnet.wrap(model, 1)):
        with pytest.warns(UserWarning, match=f"makes another model than this test_vit: .*{message}"):
            dynnet.save(saved, path, {**name, **create})
        with pytest.raises(CheckpointError, match="pass it as backbone="):
            dynnet.load(path)
        dynnet.save(saved, path, {**name, **settings})
        image = torch.randn(1, 3, 160, 160)
        assert torch.equal(dynnet.load(path)(image), saved(image))


def test_nothing_else_is_opened(saved: Path) -> None:
    case: Case = FEW[0]
    with watched() as seen:
        model = dynnet.load(saved)
    assert seen == []
    assert model(case.images()).shape == (5, CLASSES)
