"""Weights that more than their own layer uses: nothing is cut or folded under anybody's feet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynnet
from dynnet.channels.finding import find_groups
from dynnet.errors import GateError, PruneError
from dynnet.pruning import sparsify_
from tests.cases import CHAIN, enliven


class Sharing(nn.Module):
    """Four convolutions in a row and a classifier; the forward does more before the third, and maybe shares."""

    def __init__(self, more: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.norm, self.other = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.d, self.fc = nn.Conv2d(16, 24, 3), nn.Linear(24, 4)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(x).relu())).relu()
        x = x if self.more is None else self.more(self, x)
        return self.fc(self.d(self.other(self.c(x)).relu()).relu().mean((2, 3)))


def convolved(m: Sharing, x: Tensor) -> Tensor:
    return F.conv2d(x, m.b.weight, None, 1, 1)


def multiplied(m: Sharing, x: Tensor) -> Tensor:
    return x * (m.d.weight.mean() + m.b.bias.sum())


def scaled(m: Sharing, x: Tensor) -> Tensor:
    return x * m.norm.weight.view(1, -1, 1, 1)


def shared(build: str) -> tuple[Sharing, set[str], str]:
    """A net, its layers whose weights something else uses, and how that is told."""
    torch.manual_seed(0)
    more = {"convolved": convolved, "multiplied": multiplied, "scaled": scaled}
    net = Sharing(more.get(build))
    enliven(net.eval())
    if build == "one weight":
        net.c.weight = net.b.weight
        return net, {"b", "c"}, "the weight of b is c.weight as well"
    if build == "one norm's weight":
        net.other.weight = net.norm.weight
        return net, {"norm", "other"}, "the weight of norm is other.weight as well"
    if build == "a second name":
        net.kept = net.b.weight
        return net, {"b"}, "the weight of b is kept as well"
    if build == "convolved":
        return net, {"b"}, "the model itself uses the weight of b without calling it"
    if build == "scaled":
        return net, {"norm"}, "mul in the model itself with a tensor of their number"
    return net, {"b", "d"}, "the model itself uses the bias of b without calling it"


BUILDS = ("one weight", "one norm's weight", "a second name", "convolved", "multiplied", "scaled")


@pytest.mark.parametrize("build", BUILDS)
def test_channels_of_shared_weights_are_pinned_and_say_why(build: str) -> None:
    net, users, told = shared(build)
    groups = find_groups(net, CHAIN)
    for group in groups:
        if users & {member.layer for member in group.members}:
            assert group.pinned is not None
    assert told in [group.pinned for group in groups]
    assert any(group.pinned is None for group in groups) == (build != "multiplied")


@pytest.mark.parametrize("build", BUILDS)
@torch.no_grad()
def test_every_verb_leaves_shared_weights_shared_and_answers_right(build: str) -> None:
    net, users, _ = shared(build)
    images = torch.randn(3, *CHAIN)
    expected, size = net(images), len(list(net.parameters()))
    folded = dynnet.fold(net, CHAIN)
    torch.testing.assert_close(folded(images), expected, atol=1e-4, rtol=1e-4)
    assert len(list(folded.parameters())) <= size
    assert (folded.c.weight is folded.b.weight) == (build == "one weight")
    if build != "multiplied":
        slim = dynnet.prune(net, macs=0.95, criterion="l1", multiple=1, input_size=CHAIN)
        assert slim(images).shape == (3, 4)
        assert (slim.c.weight is slim.b.weight) == (build == "one weight")
        model = dynnet.wrap(net, [], gates=dynnet.GateConfig(unit=4), input_size=CHAIN)
        assert not users & {site.layer for site in model.gates.plan.sites}


def test_masks_are_refused_where_another_module_holds_the_weight() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(8, 4), "answer": nn.Linear(4, 8)})
    model["answer"].weight = model["words"].weight
    with pytest.raises(PruneError, match="words and answer share their weights"):
        sparsify_(model, 0.5)
    net, _, _ = shared("one weight")
    with pytest.raises(PruneError, match="b and c share their weights"):
        sparsify_(net, 0.5, exclude=["b"])
    sparsify_(net, 0.5, exclude=["b", "c"])
    assert net.b.weight is net.c.weight


class Encoder(nn.Module):
    """Torch's own encoder, which computes without calling its layers where numbers run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patches(x).flatten(2).mT).mean(1))


def test_what_torch_computes_at_once_can_be_cut_but_not_gated() -> None:
    model, images = Encoder().eval(), torch.randn(3, *CHAIN)
    slim = dynnet.prune(model, macs=0.8, criterion="l1", multiple=4, input_size=CHAIN)
    assert slim.encoder.linear1.out_features < 64
    with torch.no_grad():
        at_once = slim(images)
    torch.testing.assert_close(at_once, slim(images))
    with pytest.raises(GateError, match="encoder computes what is in it at once, without calling it"):
        dynnet.wrap(model, [], gates=dynnet.GateConfig(unit=4), input_size=CHAIN)


@torch.no_grad()
def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)
            self.block = nn.Sequential(nn.Conv2d(3, 8, 3), self.norm, nn.ReLU())
            self.head = nn.Sequential(nn.Flatten(), self.fc)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x).mean((2, 3)))

    model, images = Named().eval(), torch.randn(3, *CHAIN)
    enliven(model)
    folded = dynnet.fold(model, CHAIN)
    torch.testing.assert_close(folded(images), model(images), atol=1e-5, rtol=1e-4)
    assert folded.norm is folded.block[1]
    assert not isinstance(folded.norm, nn.BatchNorm2d)
