"""What gates decide: regions of a backbone, the units in each, and which channels of which layers they switch.

Gates decide channel by channel, or pick one of a few widths.

Channel by channel, a region is a run of blocks of one resolution whose channel groups one gate network decides on, from
the input of the layer that makes the first of their channels: one image at a time, a gate network costs more than its
MACs. Neighbouring units are merged, so that a decision switches several channels at once: they are fetched faster.

Of widths, a region is all that lies between two exits. A router decides when a sample goes on from the first of them,
and each width is the first units of every group: a dense, narrow network, which runs on all samples that have it.

    C channels of a layer, U units of a region, u channels in a block, K widths
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynnet.cost.ledger import Decider, Switch
from dynnet.errors import GateError
from dynnet.exits.boundaries import Feature

HIDDEN = (16, 64)  # units of a gate network's hidden layer: a quarter of its inputs, within these bounds


@dataclass(frozen=True)
class GateConfig:
    """How channels are gated.

    Attributes:
        unit: neighbouring channels that are switched together: 1 for single channels, 8 or 16 for speed; a half of it,
            a quarter, where a layer is so narrow that it would have less than four units.
        blocks: how many blocks, at most, one gate network decides on; 1 for a network of its own in each.
        exclude: modules, by name, inside of which nothing is gated.
        widths: shares of the units of every group, rising; where there are any, routers at the exits pick one of them
            for all blocks up to the next exit, and `blocks` means nothing.
    """

    unit: int = 8
    blocks: int = 4
    exclude: tuple[str, ...] = ()
    widths: tuple[float, ...] = ()


WIDTHS = (0.25, 0.5, 0.75, 1.0)
_MOST_WIDTHS = 8


def check_gates(gates: str | GateConfig | None) -> GateConfig | None:
    """What a user may write for `gates=`, as a configuration.

    Raises:
        GateError: something else.
    """
    if gates is None or isinstance(gates, GateConfig):
        if gates is None:
            return None
        if isinstance(gates.widths, list):  # such a configuration could not be hashed
            gates = replace(gates, widths=tuple(gates.widths))
        if gates.widths:
            _check_widths(gates.widths)
        return gates
    if gates == "channel":
        return GateConfig()
    if gates == "width":
        return GateConfig(widths=WIDTHS)
    raise GateError(f"gates={gates!r}: give 'channel', 'width', a GateConfig, or None")


def _check_widths(widths: tuple[float, ...]) -> None:
    numbers = all(isinstance(width, (int, float)) and 0 < width <= 1 for width in widths)
    if not numbers or not 2 <= len(widths) <= _MOST_WIDTHS or list(widths) != sorted(set(widths)):
        raise GateError(
            f"widths={widths}: give 2 to {_MOST_WIDTHS} shares of the channels in (0, 1], rising, such as {WIDTHS}"
        )


@dataclass(frozen=True)
class Region:
    """What one gate network decides.

    Attributes:
        layer: at whose entry the decision is taken; of widths, the first layer that they narrow.
        groups: units of each of its groups; U is their sum.
        inputs: channels of what the network reads: that layer's input, or features of the exit before.
        segment: exits that are passed before it.
        widths: for each of K widths, how many units of each group are open, the first ones; none where single units are
            decided on.
        feature: which features of the exit before a router reads.
    """

    layer: str
    groups: tuple[int, ...]
    inputs: int
    segment: int = 0
    widths: tuple[tuple[int, ...], ...] = ()
    feature: Feature | None = None

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
        return self.inputs * self.hidden + self.hidden * (len(self.widths) or self.units)

    @property
    def masks(self) -> Tensor:
        """(K, U) bool: what each width leaves open."""
        rows = [zip(self.groups, counts, strict=True) for counts in self.widths]
        return torch.stack([torch.cat([torch.arange(units) < count for units, count in row]) for row in rows])

    @property
    def least(self) -> Tensor:
        """(U,) bool, the cheapest decision: the first width, or of every group the last unit, the smallest."""
        if self.widths:
            return self.masks[0]
        return torch.cat([torch.arange(units) == units - 1 for units in self.groups])


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
class Container:
    """A module that runs once for each width, on the samples that have it.

    Attributes:
        name: of the module.
        region: that decides on all that it holds.
        takes, gives: the batch's tensors among the leaves of (args, kwargs) and of the output, as (position, dimension
            of the batch, entries per sample).
    """

    name: str
    region: int
    takes: tuple[tuple[int, int, int], ...]
    gives: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class GatePlan:
    """All regions and sites of a backbone.

    Attributes:
        regions: in the order in which they are decided.
        sites: in the order in which the layers run.
        macs_share: of the backbone's MACs, in layers with at least one side under a gate.
        containers: modules that run once for each width, in running order; none where single units are decided on.
        norms: batch norms inside of them, which remember means and variances of each width.
    """

    regions: tuple[Region, ...]
    sites: tuple[Site, ...]
    macs_share: float
    containers: tuple[Container, ...] = ()
    norms: tuple[str, ...] = ()

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
