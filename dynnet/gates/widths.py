"""Which channel groups take part in a few nested widths, and what runs once for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from dynnet.backbone.layers.table import is_batch_norm, weighing_kind
from dynnet.backbone.names import check_excluded, is_inside, title
from dynnet.channels.groups import Group
from dynnet.errors import GateError
from dynnet.exits.boundaries import Boundary, Places
from dynnet.gates.containers import Room, rooms
from dynnet.gates.plan import Container, GateConfig, GatePlan, Region
from dynnet.gates.planning import SMALLEST, fixed, make_sites, nothing_to_gate, units_of

_FEWEST_SAVED = 0.5  # of a group: about what the narrower widths save


def plan_widths(
    places: Places, exits: Sequence[Boundary], groups: Sequence[Group], config: GateConfig, fused: Mapping[str, str]
) -> GatePlan:
    """Choose what to narrow.

    Args:
        places: of the backbone.
        exits: where routers stand.
        groups: of the backbone, in running order.
        config: with widths.
        fused: layers that are not run as they are, and why.

    Raises:
        GateError: no exits, an unknown module to exclude, or nothing to narrow; the message says why.
    """
    name = title(places.backbone)
    if not exits:
        raise GateError("widths are picked at exits, and there are none; give exits=, whose thresholds may stay at inf")
    if config.unit < 1:
        raise GateError(f"unit={config.unit}: give a number of 1 or more")
    modules = dict(places.backbone.named_modules())
    check_excluded(config.exclude, modules, name, GateError)
    there = rooms(places.trace, [places.end(boundary) for boundary in exits])
    refused = [_why_not(group, config, places, there, fused) for group in groups]
    chosen = [group for group, reason in zip(groups, refused, strict=True) if reason is None]
    if not chosen:
        raise nothing_to_gate(name, groups, refused)
    regions, numbers = _regions(chosen, config, exits)
    of_segment = {region.segment: number for number, region in enumerate(regions)}
    layers = [member.layer for group in chosen for member in group.members]
    used = [room for room in there if any(_holds(room, layer) for layer in layers)]
    sites = make_sites(chosen, numbers, regions, config)
    covered = sum(places.trace.layers.get(site.layer, 0) for site in sites)
    return GatePlan(
        tuple(regions),
        tuple(sites),
        covered / places.trace.macs,
        tuple(Container(room.name, of_segment[room.segment], room.takes, room.gives) for room in used),
        _norms(modules, [room.name for room in used]),
    )


def _why_not(
    group: Group, config: GateConfig, places: Places, there: Sequence[Room], fused: Mapping[str, str]
) -> str | None:
    """Why a group keeps its width; None where it takes part."""
    layers = [member.layer for member in group.members]
    if (reason := fixed(group, config, fused)) is not None:
        return reason
    if group.segment == 0:
        return "nobody has decided before the first exit"
    if reason := _unlike_cut(group, places.twin):
        return reason
    if not any(all(_holds(room, layer) for layer in layers) for room in there):
        return f"no module around {layers[0]} and what shares its channels can run on some of the samples"
    weighing = [member for member in group.members if member.role in ("produces", "reads")]
    macs = places.trace.layers
    saved = sum(macs.get(member.layer, 0) * member.channels.size / member.width for member in weighing)
    if _FEWEST_SAVED * saved < SMALLEST * places.trace.macs:
        return f"{layers[0]} costs next to nothing"
    return None


def _unlike_cut(group: Group, twin: nn.Module) -> str | None:
    """Why a narrow layer would give something else than one whose other channels are zero; None where it does not."""
    for member in group.members:
        if member.role == "mixes":
            return f"{member.layer} looks at all of its channels at once"
        layer = twin.get_submodule(member.layer)
        kind = weighing_kind(layer)
        if member.role == "reads" and kind is not None and not kind.weights_as_they_are(layer):
            return f"{member.layer} standardises its weights over all that it reads"
    return None


def _holds(room: Room, layer: str) -> bool:
    return is_inside(layer, [room.name])


def _regions(
    groups: Sequence[Group], config: GateConfig, exits: Sequence[Boundary]
) -> tuple[list[Region], list[tuple[int, int]]]:
    """One region a segment, and for every group (number of its region, first unit in it)."""
    regions: list[Region] = []
    numbers: list[tuple[int, int]] = []
    for segment in sorted({group.segment for group in groups}):
        mine = [group for group in groups if group.segment == segment]
        units = tuple(units_of(group, config) for group in mine)
        widths = tuple(tuple(max(1, round(share * count)) for count in units) for share in config.widths)
        feature = exits[segment - 1].features[0]
        regions.append(Region(mine[0].members[0].layer, units, feature.channels, segment, widths, feature))
    first = [0] * len(regions)
    of_segment = {region.segment: number for number, region in enumerate(regions)}
    for group in groups:
        number = of_segment[group.segment]
        numbers.append((number, first[number]))
        first[number] += units_of(group, config)
    return regions, numbers


def _norms(modules: Mapping[str, nn.Module], around: Sequence[str]) -> tuple[str, ...]:
    """Batch norms inside of some modules."""
    return tuple(name for name, module in modules.items() if is_batch_norm(module) and is_inside(name, around))
