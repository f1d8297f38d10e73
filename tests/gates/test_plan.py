"""What gates decide."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import dynnet
from dynnet.channels.finding import find_groups
from dynnet.errors import GateError
from dynnet.gates.plan import GateConfig, Region
from tests.cases import tiny

SIZE = (3, 32, 32)


def regions(config: GateConfig, exits: object = (), **kwargs: float) -> tuple[Region, ...]:
    model = dynnet.wrap(timm.create_model("cifar_resnet20", **kwargs), exits, gates=config, input_size=SIZE)
    return model.gates.plan.regions


def test_one_network_decides_on_neighbouring_blocks_of_one_resolution() -> None:
    every = regions(GateConfig(blocks=1))
    assert [r.layer for r in every] == [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in range(3)]
    assert all(len(r.groups) == 1 for r in every)
    pairs = regions(GateConfig(blocks=2))
    assert [r.layer for r in pairs if "layer1" in r.layer] == ["layer1.0.conv1", "layer1.2.conv1"]
    assert [len(r.groups) for r in pairs if "layer1" in r.layer] == [2, 1]
    # Blocks of one resolution; the first convolution of layer2 works at half of that of layer1.
    assert [r.layer for r in regions(GateConfig(blocks=9))] == ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]


def test_no_region_reaches_past_an_exit() -> None:
    found = regions(GateConfig(blocks=9), exits=["layer2.0"])
    assert [(r.layer, r.segment) for r in found] == [
        ("layer1.0.conv1", 0), ("layer2.0.conv1", 0), ("layer2.1.conv1", 1), ("layer3.0.conv1", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(("unit", "units"), [(1, 16), (4, 4), (8, 4), (64, 4)])
def test_units_are_merged_but_never_to_less_than_four(unit: int, units: int) -> None:
    assert regions(GateConfig(unit=unit, blocks=1))[0].groups == (units,)


def test_the_last_unit_takes_what_is_left() -> None:
    # Widths 20, 40, 80.
    groups = regions(GateConfig(unit=8, blocks=1), width=1.25)
    assert [r.groups for r in groups[::3]] == [(5,), (5,), (10,)]
    odd = regions(GateConfig(unit=3, blocks=1), width=1.25)
    assert odd[0].groups == (7,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GateConfig(unit=0), "unit=0: give a number of 1 or more"),
        (GateConfig(exclude=("layer9",)), "has no module 'layer9'"),
        (GateConfig(exclude="layer1"), r"exclude='layer1': give a list of module names, such as \['layer1'\]"),
        (GateConfig(exclude=("layer1", "layer2", "layer3")), "no channels to gate.*excluded are"),
    ],
)
def test_what_cannot_be_gated_is_explained(config: GateConfig, message: str) -> None:
    with pytest.raises(GateError, match=message):
        regions(config)


def test_channels_that_are_not_worth_a_network_are_explained() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(GateError, match="0 reads only 3 channels, from which nothing can be decided"):
        dynnet.wrap(net, [], gates="channel", input_size=SIZE)
    net = nn.Sequential(*tiny().children())
    net.insert(3, nn.Sequential(nn.Conv2d(24, 2, 1), nn.Conv2d(2, 24, 1)))
    found = dynnet.wrap(net, [], gates=GateConfig(unit=1), input_size=SIZE).gates.plan
    assert "3.0" in {site.layer for site in found.sites}  # for what it reads
    assert "3.1" not in {site.layer for site in found.sites}


class SequenceFirst(nn.Module):
    """An MLP over tokens that lie before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 64), nn.Linear(64, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        return self.fc((x + self.down(self.up(x).relu())).mean(0))


def test_layers_that_do_not_see_the_batch_first_are_left_alone() -> None:
    with pytest.raises(GateError, match="the first dimension in up is not the batch"):
        dynnet.wrap(SequenceFirst(), [], gates="channel", input_size=SIZE)


class Straddling(nn.Module):
    """What `side` makes before the exit at `mid` is read behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.mid = (nn.Conv2d(i, 32, 3, padding=1) for i in (3, 32, 32))
        self.last, self.fc = Summed(), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.side(x)
        return self.fc(self.last(self.mid(x), y).mean((2, 3)))


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(y)


def test_channels_that_travel_past_an_exit_are_left_alone() -> None:
    def layers(exits: list[str]) -> set[str]:
        plan = dynnet.wrap(Straddling(), exits, gates="channel", input_size=SIZE).gates.plan
        return {site.layer for site in plan.sites}

    assert "side" in layers([])
    assert "side" not in layers(["mid"])
    reasons = {g.members[0].layer: g.pinned for g in find_groups(Straddling(), SIZE, ["mid"])}
    assert reasons["side"] == "an exit stands between the layers that make them and those that read them"
