"""Channel groups of networks whose groups one can see."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import SEModule
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from dynnet.channels.finding import find_groups
from dynnet.channels.groups import Group

SIZE = (3, 16, 16)


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


class Net(nn.Module):
    """Layers by name, and a forward given as a function."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def groups_of(net: nn.Module) -> dict[str, Group]:
    """By the layer that makes their first channels."""
    return {g.members[0].layer: g for g in find_groups(net, SIZE) if g.members[0].role == "produces"}


def roles(group: Group) -> list[tuple[str, str, int]]:
    return [(m.layer, m.role, m.channels.shape[1]) for m in group.members]


def test_a_chain_is_tied_link_by_link() -> None:
    net = Net(
        lambda m, x: m.fc(m.b(m.norm(m.a(x)).relu()).mean((2, 3))),
        a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 6), fc=nn.Linear(6, 4),
    )  # fmt: skip
    found = groups_of(net)
    assert roles(found["a"]) == [("a", "produces", 1), ("norm", "passes", 1), ("b", "reads", 1)]
    assert roles(found["b"]) == [("b", "produces", 1), ("fc", "reads", 1)]
    assert (found["a"].units, found["b"].units) == (8, 6)
    assert found["a"].pinned is None
    assert not found["a"].coupled
    assert found["fc"].pinned == "they are the model's answer"
    assert found["a"].members[0].pixels == 256
    assert found["b"].members[1].pixels == 1


def test_a_residual_sum_couples_and_what_lies_inside_is_free() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.b(m.a(x))
        return m.fc(x.mean((2, 3)))

    found = groups_of(Net(forward, stem=conv(3, 8), a=conv(8, 5), b=conv(5, 8), fc=nn.Linear(8, 2)))
    assert roles(found["a"]) == [("a", "produces", 1), ("b", "reads", 1)]
    assert not found["a"].coupled
    assert found["stem"].coupled
    assert found["stem"].layers("produces") == ("stem", "b")
    assert found["stem"].layers("reads") == ("a", "fc")


def test_channel_attention_belongs_to_what_it_scales() -> None:
    net = Net(lambda m, x: m.b(m.se(m.a(x))).mean((2, 3)), a=conv(3, 16), se=SEModule(16, rd_channels=4), b=conv(16, 4))
    found = groups_of(net)
    assert roles(found["a"]) == [
        ("a", "produces", 1), ("se.fc1", "reads", 1), ("se.fc2", "produces", 1), ("b", "reads", 1),
    ]  # fmt: skip
    assert not found["a"].coupled
    assert roles(found["se.fc1"]) == [("se.fc1", "produces", 1), ("se.fc2", "reads", 1)]


def test_concatenated_channels_keep_their_places() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.a(x), m.b(x)], 1)).mean((2, 3))

    found = groups_of(Net(forward, a=conv(3, 4), b=conv(3, 6), c=conv(10, 2)))
    assert found["a"].members[1].channels.flatten().tolist() == [0, 1, 2, 3]
    assert found["b"].members[1].channels.flatten().tolist() == [4, 5, 6, 7, 8, 9]


def test_grouped_convolutions_move_whole_groups() -> None:
    net = Net(lambda m, x: m.c(m.b(m.a(x))).mean((2, 3)), a=conv(3, 8), b=conv(8, 16, groups=4), c=conv(16, 2))
    group = groups_of(net)["a"]
    assert group.units == 4
    assert roles(group) == [("a", "produces", 2), ("b", "reads", 2), ("b", "produces", 4), ("c", "reads", 4)]
    assert group.members[3].channels[1].tolist() == [4, 5, 6, 7]
    assert not group.coupled


def test_depthwise_layers_pass_channels_on() -> None:
    net = Net(lambda m, x: m.c(m.b(m.a(x))).mean((2, 3)), a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 2))
    assert roles(groups_of(net)["a"]) == [("a", "produces", 1), ("b", "passes", 1), ("c", "reads", 1)]


def test_the_halves_of_a_gated_mlp_go_together() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x, gate = m.a(x.flatten(2).mT).chunk(2, -1)
        return m.b(x * gate.sigmoid()).mean(1)

    group = groups_of(Net(forward, a=nn.Linear(3, 12), b=nn.Linear(6, 2)))["a"]
    assert group.units == 6
    assert group.pinned is None
    assert group.members[0].channels.tolist() == [[i, i + 6] for i in range(6)]


def test_norms_over_channels_are_known_to_mix() -> None:
    net = Net(
        lambda m, x: m.b(m.grn(m.norm(m.a(x).permute(0, 2, 3, 1)))).mean((1, 2)),
        a=conv(3, 8), norm=nn.LayerNorm(8), grn=GlobalResponseNorm(8), b=nn.Linear(8, 2),
    )  # fmt: skip
    group = groups_of(net)["a"]
    assert roles(group)[1:3] == [("norm", "mixes", 1), ("grn", "mixes", 1)]
    assert group.pinned is None


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda m, y: y.softmax(1), "_softmax in the model itself"),
        (lambda m, y: y / y.mean(1, keepdim=True), "mean in the model itself"),
        (lambda m, y: y.unflatten(1, (2, 4)).flip(1).flatten(1, 2), "view in the model itself"),
        (lambda m, y: torch.cat([y[:, :2], y[:, 2:]], 1), "slice in the model itself"),
        (lambda m, y: y + m.scale, "add in the model itself with a tensor of their number"),
        (lambda m, y: y + y.sum(), "sum in the model itself"),
        (lambda m, y: torch.cat(y.split([2, 6], 1)[::-1], 1), "split_with_sizes in the model itself"),
    ],
)
def test_what_cannot_be_followed_pins_and_says_why(between, reason: str) -> None:
    net = Net(lambda m, x: m.b(between(m, m.a(x))).mean((2, 3)), a=conv(3, 8), b=conv(8, 8))
    net.scale = nn.Parameter(torch.ones(8, 1, 1))
    group = groups_of(net)["a"]
    assert group.pinned == reason


def only_eight(y: Tensor) -> Tensor:
    if y.shape[1] != 8:
        raise ValueError("give me eight")
    return y


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (only_eight, "the forward of the model itself needs their number"),
        (lambda y: torch.cat([y.split(2, 1)[i] for i in range(4)], 1), "the forward of the model itself needs"),
        (lambda y: y.reshape(1, 8, -1, 16), "view in the model itself"),
        (lambda y: y[:, :1] + y[:, 4:5] + y, "slice in the model itself"),
        (lambda y: y.as_strided((1, 8, 16, 16), (2048, 256, 16, 1)), "as_strided in the model itself"),
        (lambda y: y.narrow(1, 0, 8), "the forward of the model itself needs their number"),
        (lambda y: y * y.shape[1] ** -0.5, "the model itself computes with their number"),
    ],
)
def test_a_forward_that_counts_channels_pins_them(between, reason: str) -> None:
    net = Net(
        lambda m, x: m.d(m.c(between(m.b(m.a(x))))).mean((2, 3)),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8),
    )  # fmt: skip
    found = groups_of(net)
    assert found["b"].pinned is not None
    assert found["b"].pinned.startswith(reason)
    assert found["a"].pinned is None
    assert found["c"].pinned is None


def test_a_forward_that_compares_two_widths_pins_them() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y, z = m.a(x), m.b(x)
        return m.c(y[:, : z.shape[1]]).mean((2, 3)) + m.d(z).mean((2, 3))

    found = groups_of(Net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 2), d=conv(8, 2)))
    assert found["a"].pinned is not None


def test_any_number_of_equal_pieces_is_narrowed_alike() -> None:
    net = Net(lambda m, x: m.b(torch.cat(m.a(x).chunk(4, 1)[::-1], 1)).mean((2, 3)), a=conv(3, 8), b=conv(8, 2))
    group = groups_of(net)["a"]
    assert group.pinned is None
    assert group.members[0].channels.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_layer_that_runs_twice_is_pinned() -> None:
    net = Net(lambda m, x: m.b(m.b(m.a(x))).mean((2, 3)), a=conv(3, 8), b=conv(8, 8))
    assert groups_of(net)["a"].pinned == "b runs more than once"


def test_channels_that_an_exit_reads_are_pinned() -> None:
    net = Net(lambda m, x: m.b(m.a(x)).mean((2, 3)), a=conv(3, 8), b=conv(8, 8))
    assert find_groups(net, SIZE, seen=["a"])[1].pinned == "an exit reads them at a"


def test_finding_leaves_the_model_as_it_was() -> None:
    net = timm.create_model("test_resnet").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    find_groups(net, (3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_what_breaks_elsewhere_is_no_reason_against_modules_built_alike() -> None:
    class Stubborn(nn.Module):
        """Has a width written down; what it adds to is free."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return x + self.second(y.reshape(len(x), 8, -1).relu().view_as(y))

    class Counting(nn.Module):
        """Computes with the width of its first stage, not with that of its second."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 16, 3), Stubborn(16), Stubborn(16)
            self.down, self.c, self.d = nn.Conv2d(16, 24, 3), Stubborn(24), Stubborn(24)
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.b(self.a(x * x.shape[1] ** -0.5))
            return self.head(self.d(self.c(self.down(x))).mean((2, 3)))

    groups = find_groups(Counting().eval(), (3, 16, 16))
    first = {group.members[0].layer: group for group in groups}
    assert "computes with their number" in str(first["stem"].pinned)
    assert first["down"].pinned is None
    for name in "abcd":
        assert f"the forward of {name} needs their number" in str(first[f"{name}.first"].pinned)
