"""Where exits can stand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import dynnet
from dynnet.backbone.input_size import input_size_of
from dynnet.errors import ExitError
from dynnet.exits.boundaries import Places
from dynnet.exits.placing import resolve
from tests.cases import CASES, tiny


def places(name: str = "resnet18") -> Places:
    with torch.device("meta"):
        return Places(timm.create_model(name), (3, 224, 224))


def test_names_fractions_and_numbers() -> None:
    resnet = places()
    assert [b.name for b in resolve(resnet, ["layer1", 0.7])] == ["layer1", "layer3.0"]
    assert [b.name for b in resolve(resnet, 2)] == [b.name for b in resolve(resnet, [1 / 3, 2 / 3])]
    assert resolve(resnet, 0) == []
    shares = [b.macs_share for b in resolve(resnet, 4)]
    assert shares == sorted(shares)
    for share, wanted in zip(shares, (0.2, 0.4, 0.6, 0.8), strict=True):
        assert abs(share - wanted) < 0.1


def test_fractions_share_out_what_there_is() -> None:
    """Two fractions nearest to the same boundary get two boundaries."""
    a, b = resolve(places(), [0.60, 0.61])
    assert a.macs_share < b.macs_share


def test_proposals_are_blocks_and_stages() -> None:
    names = [b.name for b in places("regnetx_002").candidates]
    assert "s3.b2" in names
    assert not any("conv" in n for n in names if n.startswith("s"))
    assert all(b.macs_share <= 0.95 for b in places().candidates)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (["layer5"], r"no boundary 'layer5' in resnet18; choose from .*layer1, .*; did you mean"),
        (["layer1.0.conv1"], "what follows still needs the whole batch"),
        (["layer2", "layer1"], r"exit 'layer1' does not come after 'layer2'"),
        (["layer1", "layer1"], "exit 'layer1' stands twice"),
        ([0.5, 0.5], "list fractions in rising order, each once"),
        ([0.7, 0.3], "list fractions in rising order"),
        ([0.0], "exit 0.0: a fraction lies strictly between 0 and 1"),
        ([1.0], "exit 1.0: a fraction"),
        ([-0.5], "strictly between"),
        ([1], "exit 1: give a module name, or a fraction"),
        ("layer1", r"exits='layer1': give a list"),
        (-1, "cannot be negative"),
        (100, r"usable boundaries, too few for 100 exits"),
        (["fc"], "an exit must save some"),
        (["layer3", 0.2], "exit 0.2 is out of order: 'layer3' stands at 0.7"),
        ([0.9, "layer1"], "exit 0.9 is out of order: 'layer1' stands at 0.3"),
    ],
)
def test_impossible_exits_are_explained(exits: object, message: str) -> None:
    backbone = timm.create_model("resnet18")
    with pytest.raises(ExitError, match=message):
        dynnet.wrap(backbone, exits)
    assert not any(m._forward_hooks for m in backbone.modules())


def test_a_module_that_runs_twice_is_no_boundary() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(self.a(x))).mean((2, 3)))

    with pytest.raises(ExitError, match="module 'a' runs 2 times in a forward"):
        dynnet.wrap(Twice(), ["a"], input_size=(3, 8, 8))


def test_a_backbone_without_boundaries_says_so() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((x + self.conv(x)).mean((2, 3)))

    with pytest.raises(
        ExitError, match="0 usable boundaries, too few for 1 exits; a boundary is a module whose output"
    ):
        dynnet.wrap(Residual(), 1, input_size=(3, 8, 8))


def test_a_backbone_without_classifier_is_refused() -> None:
    with pytest.raises(ExitError, match=r"has no classifier \(num_classes=0\); create it with num_classes=K"):
        dynnet.wrap(timm.create_model("resnet18", num_classes=0))
    with pytest.raises(ExitError, match=r"one tensor of \(B, K\) logits is needed"):
        dynnet.wrap(nn.Conv2d(3, 3, 1), input_size=(3, 8, 8))


def test_a_size_that_the_backbone_cannot_take_is_refused() -> None:
    with pytest.raises(ExitError, match=r"test_vit cannot run on images of size \(3, 50, 50\) .* as input_size="):
        dynnet.wrap(timm.create_model("test_vit"), 1, input_size=(3, 50, 50))


def test_images_need_not_be_square() -> None:
    model = dynnet.wrap(timm.create_model("cifar_resnet20"), ["layer2"], input_size=(3, 64, 32))
    assert [(f.layout, f.channels) for f in model.boundaries[0].features] == [("nchw", 32)]


def test_layouts_are_recognised() -> None:
    found = {case.name: [f.layout for b in case.wrapped().boundaries for f in b.features] for case in CASES[:1]}
    assert found["cifar_resnet20"] == ["nchw", "nchw"]
    swin = next(c for c in CASES if c.name.startswith("swin")).wrapped()
    assert {f.layout for b in swin.boundaries for f in b.features} == {"nhwc"}
    vit = next(c for c in CASES if c.name == "vit_tiny_patch16_224").wrapped()
    assert [(f.layout, f.prefix) for b in vit.boundaries for f in b.features] == [("tokens", 1)] * 2
    cross = next(c for c in CASES if c.name == "crossvit_9_240").wrapped()
    assert [len(b.features) for b in cross.boundaries] == [2, 2]


def test_the_input_size_is_the_hosts() -> None:
    assert input_size_of(timm.create_model("resnet18", in_chans=1)) == (1, 224, 224)
    assert input_size_of(timm.create_model("test_vit", img_size=64)) == (3, 64, 64)
    assert input_size_of(tiny()) == (3, 224, 224)
    with torch.device("meta"):
        assert input_size_of(timm.create_model("tresnet_m")) == (3, 224, 224)
