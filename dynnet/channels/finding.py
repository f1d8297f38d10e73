"""The channel groups of any model: followed by a dry run, grouped, and rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from dynnet.backbone.hooks import watching
from dynnet.backbone.keeping import unaltered
from dynnet.backbone.modes import evaluating, learning, somebodys_forward
from dynnet.backbone.owners import Owners
from dynnet.backbone.twin import meta_twin
from dynnet.channels.following import Role, Tracer
from dynnet.channels.groups import Group, Member, Number
from dynnet.channels.labels import HEADS, TOGETHER
from dynnet.channels.rehearsal import Narrowed, narrow, rehearse
from dynnet.errors import ForwardError

Mode = Callable[[nn.Module], AbstractContextManager[None]]


def find_groups(model: nn.Module, input_size: tuple[int, ...], seen: Collection[str] = ()) -> list[Group]:
    """The channel groups of any model, in the order in which their first layers run.

    Layers are those that run in eval mode. Where a model has others, of auxiliary heads, it is followed in train mode
    as well, and the channels that these read are pinned; where it cannot run to its end on images alone, as far as it
    runs.

    Args:
        model: takes one (B, *input_size) tensor.
        input_size: (C, H, W).
        seen: modules whose output something else reads as well, such as exits; their channels are pinned.

    Raises:
        ForwardError: the model's own forward does not run.
    """

    def follow(free: Sequence[Narrowed]) -> tuple[Tracer, Exception | None]:
        with stating(model, {number: one.left * number.per_unit for one in free for number in one.group.numbers}):
            return _follow(model, input_size, Tracer(seen, narrow(free), owners), modes)

    model = meta_twin(model)
    owners = Owners(model)
    modes: list[Mode] = [evaluating]
    kinds = {name: type(module) for name, module in model.named_modules()}
    tracer, error = follow([])
    if error is not None:
        raise error
    if owners.unread():
        modes.append(learning)
        tracer, error = follow([])
        modes = modes if error is None else modes[:1]
    parent = _components(tracer.atoms, [(a, b) for a, b, _ in tracer.labels.ties])
    reasons: dict[int, str] = {}
    for atoms, reason in tracer.labels.pins:
        for unit in np.unique(parent[atoms.numpy()]):
            reasons.setdefault(int(unit), reason)
    together = _together(tracer, parent)
    stated = _stated(model, tracer, parent)
    while True:
        groups = [_group(tracer, parent, sides, units, reasons, stated) for sides, units in together]
        able = [
            (group, frozenset(units))
            for group, (_, units) in zip(groups, together, strict=True)
            if group.pinned is None and group.units > 1
        ]
        # Not all alike: a forward may compare one width with another.
        free = [Narrowed(group, units, 2 + i % 3) for i, (group, units) in enumerate(able)]
        broken = rehearse(follow, tracer, free, parent, kinds)
        if not broken:
            return groups
        reasons |= broken


@contextmanager
def stating(model: nn.Module, numbers: Mapping[Number, int]) -> Iterator[None]:
    """Let modules state other numbers for as long as this lasts."""
    before = {number: getattr(model.get_submodule(number.module), number.key) for number in numbers}
    try:
        for number, value in numbers.items():
            setattr(model.get_submodule(number.module), number.key, value)
        yield
    finally:
        for number, value in before.items():
            setattr(model.get_submodule(number.module), number.key, value)


def _follow(
    model: nn.Module, input_size: tuple[int, ...], tracer: Tracer, modes: Sequence[Mode]
) -> tuple[Tracer, Exception | None]:
    """What a dry run in each of these modes saw, and what stopped it."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    modules = dict(model.named_modules())
    with unaltered(model), torch.inference_mode(False), torch.no_grad():
        images = torch.empty(1, *input_size, dtype=dtype, device="meta")
        for number, mode in enumerate(modes):
            if number:
                tracer.begin_again()
            try:
                with mode(model), watching(modules, tracer.enter, tracer.leave), tracer, somebodys_forward(model):
                    output = model(images)
            except ForwardError as error:
                return tracer, error
            tracer.finish(output)
    return tracer, None


# Grouping.


def _together(tracer: Tracer, parent: np.ndarray) -> list[tuple[tuple[int, ...], list[int]]]:
    """(numbers of the sides of layers that they touch, units), in the order of the sides."""
    touched: dict[int, list[int]] = {}
    for side, slot in enumerate(tracer.slots.values()):
        for unit in np.unique(parent[slot.first : slot.first + slot.width]):
            touched.setdefault(int(unit), []).append(side)
    together: dict[tuple[int, ...], list[int]] = {}
    for unit in sorted(touched):
        together.setdefault(tuple(touched[unit]), []).append(unit)
    return sorted(together.items())


def _stated(model: nn.Module, tracer: Tracer, parent: np.ndarray) -> dict[frozenset[int], list[Number]]:
    """By units that modules have split into heads, what these modules state of them."""
    found: dict[frozenset[int], list[Number]] = {}
    for module, labels in tracer.labels.heads.items():
        units = frozenset(int(unit) for unit in np.unique(parent[torch.cat(labels).numpy()]))
        stated = {key: value for key, value in vars(model.get_submodule(module)).items() if type(value) is int}
        numbers = [Number(module, key, 1) for key in HEADS if stated.get(key) == len(units)]
        if numbers:
            wide = [key for key in TOGETHER if key in stated and stated[key] % len(units) == 0]
            numbers += [Number(module, key, stated[key] // len(units)) for key in wide]
            found.setdefault(units, []).extend(numbers)
    return found


def _group(
    tracer: Tracer,
    parent: np.ndarray,
    touched: Sequence[int],
    units: Sequence[int],
    reasons: Mapping[int, str],
    stated: Mapping[frozenset[int], list[Number]],
) -> Group:
    index = {unit: i for i, unit in enumerate(units)}
    pinned = next((reasons[unit] for unit in units if unit in reasons), None)
    known = list(tracer.slots)
    sides = [known[side] for side in touched]
    members = []
    for layer, role in sides:
        slot = tracer.slots[layer, role]
        mine = parent[slot.first : slot.first + slot.width]
        channels = np.flatnonzero(np.isin(mine, units))
        owner = np.array([index[int(unit)] for unit in mine[channels]])
        count = np.bincount(owner, minlength=len(units))
        if (count != count[0]).any():
            pinned = pinned or f"units take different numbers of the channels of {layer}"
            positions = channels[None]
        else:
            positions = channels[np.argsort(owner, kind="stable")].reshape(len(units), -1)
        members.append(Member(layer, role, positions, slot.width, slot.pixels, layer in tracer.grouped))
    if len({tracer.slots[side].segment for side in sides}) > 1:
        pinned = pinned or "an exit stands between the layers that make them and those that read them"
    first = tracer.slots.get((members[0].layer, "reads"), tracer.slots[sides[0]])
    coupled = _is_coupled(tracer, sides)
    numbers = tuple(stated.get(frozenset(units), ()))
    return Group(tuple(members), len(units), pinned, coupled, first.width, first.segment, numbers)


def _is_coupled(tracer: Tracer, sides: Sequence[tuple[str, Role]]) -> bool:
    slots = {side: tracer.slots[side] for side in sides}
    orders = {slot.order for slot in slots.values()}
    first, last = min(orders), max(orders)
    most = max(slot.pixels for slot in slots.values())
    reads = [slot.order for (_, role), slot in slots.items() if role == "reads"]
    for (layer, role), slot in slots.items():
        # Made by what has read it: a residual loop. Channel attention does so too, behind a pooling.
        pooled = slot.pixels == 1 < most
        if (
            role == "produces"
            and not pooled
            and layer not in tracer.grouped
            and any(order < slot.order for order in reads)
        ):
            return True
    own = sum(tracer.macs[order] for order in orders)
    return sum(tracer.macs[first : last + 1]) > 2 * own


def _components(count: int, ties: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
    """(count,) int64: for every atom the smallest one that it is tied to, over any number of steps."""
    parent = np.arange(count)
    if not ties:
        return parent
    a = torch.cat([x for x, _ in ties]).numpy()
    b = torch.cat([x for _, x in ties]).numpy()
    while True:
        low = np.minimum(parent[a], parent[b])
        before = parent.copy()
        # Hook the larger root to the smaller, then let everybody point at the root.
        np.minimum.at(parent, before[a], low)
        np.minimum.at(parent, before[b], low)
        while (parent[parent] != parent).any():
            parent = parent[parent]
        if (parent == before).all():
            return parent
