"""What gates decide: regions of a backbone, the units in each, and which channels of which layers they switch.

A region is a run of blocks of one resolution whose channel groups one gate network decides on, from the input of the
layer that makes the first of their channels: one image at a time, a gate network costs more than its MACs. Neighbouring
units are merged, so that a decision switches several channels at once: they are fetched faster.

    C channels of a layer, U units of a region, u channels in a block
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynnet.cost.ledger import Decider, Switch
from dynnet.errors import GateError

HIDDEN = (16, 64)  # units of a gate network's hidden layer: a quarter of its inputs, within these bounds


@dataclass(frozen=True)
class GateConfig:
    """How channels are gated.

    Attributes:
        unit: neighbouring channels that are switched together: 1 for single channels, 8 or 16 for speed; a half of it,
            a quarter, where a layer is so narrow that it would have less than four units.
        blocks: how many blocks, at most, one gate network decides on; 1 for a network of its own in each.
        exclude: modules, by name, inside of which nothing is gated.
    """

    unit: int = 8
    blocks: int = 4
    exclude: tuple[str, ...] = ()


def check_gates(gates: str | GateConfig | None) -> GateConfig | None:
    """What a user may write for `gates=`, as a configuration.

    Raises:
        GateError: something else.
    """
    if gates is None or isinstance(gates, GateConfig):
        return gates
    if gates == "channel":
        return GateConfig()
    raise GateError(f"gates={gates!r}: give 'channel', a GateConfig, or None")


@dataclass(frozen=True)
class Region:
    """What one gate network decides.

    Attributes:
        layer: at whose entry the decision is taken.
        groups: units of each of its groups; U is their sum.
        inputs: channels of that layer's input, which the gate network reads.
        segment: exits that are passed before it.
    """

    layer: str
    groups: tuple[int, ...]
    inputs: int
    segment: int = 0

    @property
    def units(self) -> int:
        return sum(self.groups)

    @property
    def hidden(self) -> int:
        low, high = HIDDEN
        return min(max(self.inputs // 4, low), high)

    @property
    def macs(self) -> int:
        """Of the gate network, for one sample."""
        return self.inputs * self.hidden + self.hidden * self.units


@dataclass(frozen=True, eq=False)
class Side:
    """How decisions cover the input or output channels of one layer.

    Attributes:
        regions: their numbers.
        units: (C / u,) int64, for every block of channels its unit, counted through all of `regions`; their number
            altogether for blocks that are always on.
        size: u.
        width: C.
        partly: are there blocks that are always on?
    """

    regions: tuple[int, ...]
    units: Tensor
    size: int
    width: int
    partly: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Side:
        return self  # it never changes, but for what it remembers below, maybe in another thread

    @functools.cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def units_on(self, device: torch.device) -> Tensor:
        """`units`, copied once to each device."""
        return self._on(device)[0]

    def units_of_channels(self, device: torch.device) -> Tensor:
        """(C,) int64, `units` for every single channel."""
        return self._on(device)[1]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._copies:
            self._copies[device] = (self.units.to(device), self.units.repeat_interleave(self.size).to(device))
        return self._copies[device]

    @functools.cached_property
    def unit_list(self) -> list[int]:
        return [int(unit) for unit in self.units]


@dataclass(frozen=True, eq=False)
class Site:
    """One layer that is switched.

    Attributes:
        layer: its name.
        reads: cover of its inputs; None where all are always there. What passes channels on makes those that it reads.
        makes: cover of its outputs; None where all are made.
        decides: the region that is decided at its entry.
        zeroes: must what is closed be zero at its entry? Not for what passes channels on one by one.
        tied: does one decision switch inputs and outputs, group by group?
    """

    layer: str
    reads: Side | None
    makes: Side | None
    decides: int | None
    zeroes: bool
    tied: bool


@dataclass(frozen=True)
class GatePlan:
    """All regions and sites of a backbone.

    Attributes:
        regions: in the order in which they are decided.
        sites: in the order in which the layers run.
        macs_share: of the backbone's MACs, in layers with at least one side under a gate.
    """

    regions: tuple[Region, ...]
    sites: tuple[Site, ...]
    macs_share: float

    def switches(self) -> list[Switch]:
        """The sites, for the ledger."""
        found = []
        for site in self.sites:
            sides = [side for side in (site.reads, site.makes) if side is not None]
            segment = self.regions[sides[0].regions[0]].segment
            found.append(Switch(site.layer, tuple(sides[: 1 if site.tied else 2]), segment))
        return found

    def deciders(self) -> list[Decider]:
        """The gate networks, for the ledger."""
        return [Decider(number, region.macs, region.segment) for number, region in enumerate(self.regions)]
