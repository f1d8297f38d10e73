"""Which channel groups are worth a gate, and how they make up regions and sites."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dynnet.backbone.names import check_excluded, is_inside
from dynnet.channels.groups import Group, Member, bundle
from dynnet.errors import GateError
from dynnet.gates.plan import GateConfig, GatePlan, Region, Side, Site

_WORTHWHILE = 4.0  # times what its gate network costs: what a region must be able to save when half of it is closed
_BLIND = 8  # channels that a gate network reads, at least: the mean colour of an image tells nothing
SMALLEST = 0.001  # of the backbone's MACs: smaller regions are left alone


def plan_gates(
    groups: Sequence[Group],
    config: GateConfig,
    macs: Mapping[str, int],
    total: int,
    modules: Collection[str],
    unheard: Mapping[str, str],
    title: str,
) -> GatePlan:
    """Choose what to gate.

    Args:
        groups: of the backbone, in running order.
        config: granularity, and what to leave out.
        macs: of every layer, by name.
        total: MACs of the backbone.
        modules: names of all of its modules.
        unheard: layers to which decisions about samples cannot be told, and why.
        title: of the backbone, for messages.

    Raises:
        GateError: a unit of no channels, an unknown module to exclude, or nothing to gate; the message says why.
    """
    for key in ("unit", "blocks"):
        if getattr(config, key) < 1:
            raise GateError(f"{key}={getattr(config, key)}: give a number of 1 or more")
    check_excluded(config.exclude, modules, title, GateError)
    refused = [_why_not(group, config, macs, total, unheard) for group in groups]
    chosen = [group for group, reason in zip(groups, refused, strict=True) if reason is None]
    if not chosen:
        raise nothing_to_gate(title, groups, refused)
    regions, numbers = _regions(chosen, config)
    sites = make_sites(chosen, numbers, regions, config)
    covered = sum(macs.get(site.layer, 0) for site in sites)
    return GatePlan(tuple(regions), tuple(sites), covered / total)


def nothing_to_gate(title: str, groups: Sequence[Group], refused: Sequence[str | None]) -> GateError:
    """Why all groups are left alone."""
    # The classes and what nobody reads are no channels that anybody would look for.
    between = [group.layers("produces") and group.layers("reads") for group in groups]
    told = list(dict.fromkeys(reason for reason, wanted in zip(refused, between, strict=True) if reason and wanted))
    why = "; ".join(told[:4]) or "no layer reads what another one makes"
    more = f"; and {len(told) - 4} reasons more" if len(told) > 4 else ""
    return GateError(f"{title} has no channels to gate: {why}{more}")


def fixed(group: Group, config: GateConfig, unheard: Mapping[str, str]) -> str | None:
    """Why the width of a group cannot change from sample to sample, whatever it would save; None where it can."""
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
    deaf = [member.layer for member in group.members if member.layer in unheard]
    return unheard[deaf[0]] if deaf else None


def _why_not(
    group: Group, config: GateConfig, macs: Mapping[str, int], total: int, unheard: Mapping[str, str]
) -> str | None:
    """Why a group is left alone; None where it is gated."""
    if (reason := fixed(group, config, unheard)) is not None:
        return reason
    if group.inputs < _BLIND:
        return f"{group.members[0].layer} reads only {group.inputs} channels, from which nothing can be decided"
    saved = 0.0
    for member in group.members:
        if member.role in ("produces", "reads"):
            saved += 0.5 * macs.get(member.layer, 0) * member.channels.size / member.width
    cost = Region(group.members[0].layer, (units_of(group, config),), group.inputs).macs
    if saved < max(_WORTHWHILE * cost, SMALLEST * total):
        return f"half of the channels that {group.members[0].layer} makes cost less than a gate network is worth"
    return None


def _merge(group: Group, config: GateConfig) -> int:
    """How many of a group's units are switched together."""
    per_unit = group.members[0].channels.shape[1]
    return bundle(group.units, round(config.unit / per_unit))


def units_of(group: Group, config: GateConfig) -> int:
    """How many units of a group are switched one by one."""
    return math.ceil(group.units / _merge(group, config))


def _regions(groups: Sequence[Group], config: GateConfig) -> tuple[list[Region], list[tuple[int, int]]]:
    """The regions, and for every group (number of its region, first unit in it)."""
    regions: list[Region] = []
    numbers: list[tuple[int, int]] = []
    start: list[Group] = []  # of each region
    blocks: list[int] = []
    links: set[int] = set()  # groups that were chained to the one before
    for i, group in enumerate(groups):
        first, units = group.members[0].layer, units_of(group, config)
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


def make_sites(
    groups: Sequence[Group], numbers: Sequence[tuple[int, int]], regions: Sequence[Region], config: GateConfig
) -> list[Site]:
    """The layers that are switched, in running order.

    Args:
        groups: that take part.
        numbers: for every group (number of its region, first unit in it).
        regions: all of them.
        config: granularity.
    """
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
    decided = {region.layer: number for number, region in enumerate(regions) if not region.widths}
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
