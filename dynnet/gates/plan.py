"""What gates decide: regions of a backbone, the units in each, and which channels of which layers they switch.

A region is a run of blocks of one resolution whose channel groups one gate network decides on, from the input of the
layer that makes the first of their channels: one image at a time, a gate network costs more than its MACs. Neighbouring
units are merged, so that a decision switches several channels at once: they are fetched faster.

    C channels of a layer, U units of a region, u channels in a block
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynnet.backbone.names import check_excluded, is_inside
from dynnet.channels.groups import Group, Member, bundle
from dynnet.cost.ledger import Decider, Switch
from dynnet.errors import GateError

_WORTHWHILE = 4.0  # times what its gate network costs: what a region must be able to save when half of it is closed
_BLIND = 8  # channels that a gate network reads, at least: the mean colour of an image tells nothing
_SMALLEST = 0.001  # of the backbone's MACs: smaller regions are left alone
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


def plan_gates(
    groups: Sequence[Group],
    config: GateConfig,
    macs: Mapping[str, int],
    total: int,
    modules: Collection[str],
    sideways: Collection[str],
    title: str,
) -> GatePlan:
    """Choose what to gate.

    Args:
        groups: of the backbone, in running order.
        config: granularity, and what to leave out.
        macs: of every layer, by name.
        total: MACs of the backbone.
        modules: names of all of its modules.
        sideways: layers whose first dimension is not the batch: decisions about samples cannot be told to them.
        title: of the backbone, for messages.

    Raises:
        GateError: a unit of no channels, an unknown module to exclude, or nothing to gate; the message says why.
    """
    for key in ("unit", "blocks"):
        if getattr(config, key) < 1:
            raise GateError(f"{key}={getattr(config, key)}: give a number of 1 or more")
    check_excluded(config.exclude, modules, title, GateError)
    refused = [_why_not(group, config, macs, total, sideways) for group in groups]
    chosen = [group for group, reason in zip(groups, refused, strict=True) if reason is None]
    if not chosen:
        # The classes and what nobody reads are no channels that anybody would look for.
        between = [group.layers("produces") and group.layers("reads") for group in groups]
        told = list(dict.fromkeys(reason for reason, wanted in zip(refused, between, strict=True) if reason and wanted))
        why = "; ".join(told[:4]) or "no layer reads what another one makes"
        more = f"; and {len(told) - 4} reasons more" if len(told) > 4 else ""
        raise GateError(f"{title} has no channels to gate: {why}{more}")
    regions, numbers = _regions(chosen, config)
    sites = _sites(chosen, numbers, regions, config)
    covered = sum(macs.get(site.layer, 0) for site in sites)
    return GatePlan(tuple(regions), tuple(sites), covered / total)


def _why_not(
    group: Group, config: GateConfig, macs: Mapping[str, int], total: int, sideways: Collection[str]
) -> str | None:
    """Why a group is left alone; None where it is gated."""
    if group.coupled:
        return "channels that several blocks share through residual sums are left alone"
    if group.pinned is not None:
        return group.pinned
    if not group.layers("produces") or group.units < 2:
        return "nothing to choose from"
    if group.numbers:
        return f"the forward of {group.numbers[0].module} needs to be told how many heads there are"
    if any(is_inside(member.layer, config.exclude) for member in group.members):
        return f"excluded are {list(config.exclude)}"
    across = [member.layer for member in group.members if member.layer in sideways]
    if across:
        return f"the first dimension in {across[0]} is not the batch"
    if group.inputs < _BLIND:
        return f"{group.members[0].layer} reads only {group.inputs} channels, from which nothing can be decided"
    saved = 0.0
    for member in group.members:
        if member.role in ("produces", "reads"):
            saved += 0.5 * macs.get(member.layer, 0) * member.channels.size / member.width
    cost = Region(group.members[0].layer, (_units(group, config),), group.inputs).macs
    if saved < max(_WORTHWHILE * cost, _SMALLEST * total):
        return f"half of the channels that {group.members[0].layer} makes cost less than a gate network is worth"
    return None


def _merge(group: Group, config: GateConfig) -> int:
    """How many of a group's units are switched together."""
    per_unit = group.members[0].channels.shape[1]
    return bundle(group.units, round(config.unit / per_unit))


def _units(group: Group, config: GateConfig) -> int:
    return math.ceil(group.units / _merge(group, config))


def _regions(groups: Sequence[Group], config: GateConfig) -> tuple[list[Region], list[tuple[int, int]]]:
    """The regions, and for every group (number of its region, first unit in it)."""
    regions: list[Region] = []
    numbers: list[tuple[int, int]] = []
    start: list[Group] = []  # of each region
    blocks: list[int] = []
    links: set[int] = set()  # groups that were chained to the one before
    for i, group in enumerate(groups):
        first, units = group.members[0].layer, _units(group, config)
        same = next((n for n, region in enumerate(regions) if region.layer == first), None)
        if same is None and regions:
            # Made from what the group before it holds, in the same block: two in a row at most, or a plain chain of
            # layers would be one block.
            chained = first in groups[i - 1].layers("reads") and i - 1 not in links
            near = group.members[0].pixels == start[-1].members[0].pixels and group.segment == start[-1].segment
            if near and (chained or blocks[-1] < config.blocks):
                same = len(regions) - 1
                blocks[-1] += not chained
                if chained:
                    links.add(i)
        if same is None:
            same = len(regions)
            regions.append(Region(first, (), group.inputs, group.segment))
            start.append(group)
            blocks.append(1)
        region = regions[same]
        numbers.append((same, region.units))
        regions[same] = replace(region, groups=(*region.groups, units))
    return regions, numbers


def _sites(
    groups: Sequence[Group], numbers: Sequence[tuple[int, int]], regions: Sequence[Region], config: GateConfig
) -> list[Site]:
    covers: dict[tuple[str, bool], list[tuple[int, int, int, Member]]] = {}
    passing: set[str] = set()
    grouped: set[str] = set()
    order: dict[str, None] = {}
    for group, (region, offset) in zip(groups, numbers, strict=True):
        for member in group.members:
            order.setdefault(member.layer)
            makes = member.role == "produces"
            covers.setdefault((member.layer, makes), []).append((region, offset, _merge(group, config), member))
            if member.role == "passes":
                passing.add(member.layer)
        grouped |= {member.layer for member in group.members if member.grouped}
    decided = {region.layer: number for number, region in enumerate(regions)}
    known: dict[Any, Side] = {}

    def side(layer: str, makes: bool) -> Side | None:
        found = _side(covers.get((layer, makes), []), regions)
        if found is None:
            return None
        # One object for all that are alike: what is open is then looked up once.
        return known.setdefault((found.regions, tuple(found.units.tolist()), found.size), found)

    return [
        Site(
            layer,
            side(layer, False),
            side(layer, True),
            decided.get(layer),
            zeroes=layer not in passing,
            tied=layer in passing or layer in grouped,
        )
        for layer in order
    ]


def _side(covers: Sequence[tuple[int, int, int, Member]], regions: Sequence[Region]) -> Side | None:
    if not covers:
        return None
    numbers = tuple(dict.fromkeys(region for region, _, _, _ in covers))
    start = dict(zip(numbers, np.cumsum([0, *(regions[n].units for n in numbers[:-1])]).tolist(), strict=True))
    width = covers[0][3].width
    always = sum(regions[n].units for n in numbers)
    of_channel = np.full(width, always)
    for region, offset, merge, member in covers:
        for unit, channels in enumerate(member.channels):
            of_channel[channels] = start[region] + offset + unit // merge
    size = 1
    while width % (2 * size) == 0 and (of_channel.reshape(-1, 2 * size) == of_channel[:: 2 * size, None]).all():
        size *= 2
    return Side(numbers, torch.from_numpy(of_channel[::size].copy()), size, width, bool((of_channel == always).any()))
