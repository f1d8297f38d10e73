"""What runs only in training: auxiliary heads go on reading what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dynnet
from dynnet.channels.finding import find_groups
from dynnet.errors import UnsupportedError
from tests.cases import CHAIN


class Auxiliary(nn.Module):
    """A second head on the first convolution, in training; `how` says what becomes of its answer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.c, self.fc = nn.Conv2d(16, 24, 3), nn.Linear(24, 4)
        self.aux = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.a(x)).relu()
        y = self.b(x).relu()
        logits = self.fc(self.c(y).relu().mean((2, 3)))
        if self.training:
            if self.how == "scale":
                return logits + (y * self.scale).mean()
            self.kept = self.aux(nn.functional.dropout(x, 0.1, self.training) if self.how == "dropped" else x)
            if self.how == "raises":
                raise ValueError("where are the targets?")
        return (logits, self.kept) if self.training and self.how == "tuple" else logits


def auxiliary(how: str) -> Auxiliary:
    torch.manual_seed(0)
    model = Auxiliary(how).train()
    if how in ("raises", "scale"):
        model.aux[3](torch.randn(1, 8 * 10 * 10))
    else:
        model(torch.randn(2, *CHAIN))
        model.kept = None
    return model.eval()


def pinned(model: nn.Module) -> dict[str, str | None]:
    return {g.members[0].layer: g.pinned for g in find_groups(model, CHAIN) if g.layers("produces")}


@pytest.mark.parametrize("how", ["kept", "tuple", "dropped"])
def test_what_an_auxiliary_head_reads_stays(how: str) -> None:
    model = auxiliary(how)
    found = pinned(model)
    assert found["a"] is not None
    if how != "dropped":
        assert found["a"] == "aux.0 reads them in training only"
    assert found["b"] is found["c"] is None
    slim = dynnet.prune(model, macs=0.7, criterion="l1", multiple=1, input_size=CHAIN)
    images = torch.randn(2, *CHAIN)
    assert slim(images).shape == (2, 4)
    slim.train()(images)
    assert slim.kept.shape == (2, 4)


def test_parameters_that_are_used_in_training_only_pin_what_they_meet() -> None:
    assert pinned(auxiliary("scale"))["b"] == "mul in the model itself with a tensor of their number"


def test_a_train_mode_that_does_not_run_on_images_alone_counts_as_far_as_it_runs() -> None:
    found = pinned(auxiliary("raises"))
    assert found["a"] == "aux.0 reads them in training only"
    assert found["b"] is None


def test_looking_at_train_mode_leaves_no_trace() -> None:
    model = auxiliary("kept")
    model.norm.train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_groups(model, CHAIN)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.kept is None


def test_gates_leave_open_what_an_auxiliary_head_reads() -> None:
    model = dynnet.wrap(auxiliary("kept"), [], gates=dynnet.GateConfig(unit=4), input_size=CHAIN)
    assert {site.layer for site in model.gates.plan.sites} == {"b", "c", "fc"}


def test_a_wrapped_model_answers_with_logits_in_train_mode_too() -> None:
    with pytest.raises(UnsupportedError, match="Auxiliary answers with tuple in train mode.*aux_logits=False"):
        dynnet.wrap(auxiliary("tuple"), 1, input_size=CHAIN)
    model = dynnet.wrap(auxiliary("kept"), 1, input_size=CHAIN).train()
    assert [logits.shape for logits in model(torch.randn(2, *CHAIN)).logits] == [(2, 4), (2, 4)]


@pytest.mark.parametrize("aux", [True, False])
def test_googlenet_is_pruned_with_its_auxiliary_heads_and_wrapped_without(aux: bool) -> None:
    torch.manual_seed(0)
    net = torchvision.models.googlenet(num_classes=4, aux_logits=True, init_weights=False).eval()
    size, images = (3, 64, 64), torch.randn(2, 3, 64, 64)
    net.aux_logits = aux
    if aux:
        with pytest.raises(UnsupportedError, match="GoogLeNet answers with GoogLeNetOutputs in train mode"):
            dynnet.wrap(net, 2, input_size=size)
        slim = dynnet.prune(net, criterion="l1", macs=0.6, input_size=size).train()
        assert [x.shape for x in slim(images)] == [(2, 4)] * 3
    else:
        model = dynnet.wrap(net, 2, input_size=size).train()
        assert [x.shape for x in model(images).logits] == [(2, 4)] * 3
