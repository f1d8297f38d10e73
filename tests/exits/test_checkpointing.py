"""Gradient checkpointing: parts of the backbone run a second time in the backward pass, exits and gates do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dynnet
from dynnet.errors import InputError
from tests.cases import CASES, FEW, Case, leave_one_by_one, tiny

BY_NAME = {case.name: case for case in CASES}
# Where timm keeps the switch: on the model, on its stages (ConvNeXt, RegNet, Swin, MambaOut), on its dense blocks.
INSIDE = {
    "resnet18": ["layer1.1", "layer3.0"],
    "test_efficientnet": ["blocks.1.0", "blocks.2.0"],
    "test_vit": ["blocks.0", "blocks.2"],
    "test_convnext": ["stages.1.blocks.0", "stages.2.blocks.0"],
    "regnetx_002": ["s3.b1", "s4.b2"],
    "swin_tiny_patch4_window7_224": ["layers.1.blocks.0", "layers.2.blocks.0"],
    "test_mambaout": ["stages.1.blocks.0", "stages.2.blocks.0"],
    "densenet121": ["features.denseblock1", "features.transition2"],
}


def gradients(case: Case, exits: list[str], on: bool, equilibrium: bool) -> dict[str, Tensor | None]:
    model = case.wrapped(exits).train()
    model.set_grad_checkpointing(on)
    torch.manual_seed(2)
    logits = model(case.images(2), equilibrium=equilibrium).logits
    sum(F.cross_entropy(x, torch.tensor([0, 1])) for x in logits).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", INSIDE)
def test_gradients_are_those_without_it(name: str) -> None:
    equilibrium = name in ("test_vit", "test_convnext")
    plain, found = (gradients(BY_NAME[name], INSIDE[name], on, equilibrium) for on in (False, True))
    assert any(p is not None and p.any() for p in plain.values())
    for key, expected in plain.items():
        if expected is None:
            assert found[key] is None
        else:
            torch.testing.assert_close(found[key], expected, msg=key)


class Checkpointing(nn.Module):
    """Somebody's own forward, which checkpoints its second part without any switch."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.net, self.reentrant, self.runs = tiny(), reentrant, 0

    def part(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.net[2](self.net[1](x))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.part, self.net[0](x), use_reentrant=self.reentrant)
        return self.net[5](self.net[4](self.net[3](x)))


def test_a_forward_that_checkpoints_on_its_own_learns_as_well() -> None:
    images, kept = torch.randn(4, 3, 32, 32), []
    for backbone, name in ((tiny(), "1"), (Checkpointing(), "net.1")):
        torch.manual_seed(0)
        model = dynnet.wrap(backbone.train(), [name], input_size=(3, 32, 32))
        sum(x.square().sum() for x in model(images).logits).backward()
        kept.append([p.grad for p in model.parameters()])
    assert backbone.runs >= 2
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b)


def test_a_whole_wrapped_model_may_be_checkpointed() -> None:
    images, kept = torch.randn(4, 3, 32, 32), []
    for through in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(0)
        model = FEW[0].wrapped(["layer2"], gates="channel").train()
        torch.manual_seed(1)
        sum(x.square().sum() for x in through(model, images).logits).backward()
        kept.append([p.grad for p in model.parameters()])
    for a, b in zip(*kept, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_head_of_an_exit_within_no_grad_learns() -> None:
    class Frozen(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self[1](self[0](x))
            return self[5](self[4](self[3](self[2](x))))

    model = dynnet.wrap(Frozen(*tiny()).train(), ["0"], input_size=(3, 32, 32))
    model(torch.randn(4, 3, 32, 32)).logits[0].sum().backward()
    assert all(p.grad is not None for p in model.heads.parameters())


@pytest.fixture
def reentrant() -> Iterator[None]:
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(False)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_re_entrant_checkpointing_around_an_exit_is_refused(name: str) -> None:
    model = BY_NAME[name].wrapped(INSIDE[name]).train()
    model.set_grad_checkpointing()
    with pytest.raises(InputError, match="is re-entrant here, and an exit inside of it would teach"):
        model(BY_NAME[name].images(2).requires_grad_())


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "regnetx_002"])
def test_gates_inside_of_it_are_refused(name: str) -> None:
    model = BY_NAME[name].wrapped([], gates="channel").train()
    model.set_grad_checkpointing()
    with pytest.raises(InputError, match=r"would run [\w.]+ again when what gates decided is forgotten; switch it off"):
        model(BY_NAME[name].images(2))
    with torch.no_grad():
        model.eval()(BY_NAME[name].images(2))


@pytest.mark.parametrize("train", [True, False])
def test_an_exit_that_is_passed_by_is_named(train: bool) -> None:
    case = BY_NAME["resnet18"]
    model = case.wrapped(["layer1.1", "layer2"]).train(train)
    model.set_grad_checkpointing()
    with pytest.raises(InputError, match=r"did not run \['layer2'\] exactly once, where exits stand"), torch.no_grad():
        model(case.images(2))


def test_gradients_through_rows_that_left_are_refused() -> None:
    case = BY_NAME["test_convnext"]
    model = case.wrapped(INSIDE[case.name])
    leave_one_by_one(model, case.images(5))
    expected = model(case.images(5))
    model.set_grad_checkpointing()
    with pytest.raises(InputError, match=r"run blocks again with rows that have left; answer under torch.no_grad"):
        model(case.images(5))
    assert torch.equal(model.predict(case.images(5)).logits, expected)
    model.thresholds = [2.0, 2.0]  # heads run, nobody leaves
    model(case.images(5)).sum().backward()


def test_convolutions_whose_gradients_would_be_wrong_are_refused() -> None:
    class Strided(Checkpointing):
        def __init__(self) -> None:
            super().__init__()
            self.net[0][0], self.net[1][0] = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 16, 1, 2)
            self.net[0][1] = nn.BatchNorm2d(4)

    model = dynnet.wrap(Strided().train(), ["net.2"], input_size=(3, 32, 32))
    images = torch.randn(4, 3, 32, 32)
    sum(x.sum() for x in model(images).logits).backward()
    with pytest.raises(InputError, match=r"strided 1x1 convolution of 4 inputs again in channels_last"):
        model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
