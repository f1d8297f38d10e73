"""Channel groups: which channels of which layers live and die together.

Channels that a dry run finds tied (`tracer.py`) form a *unit* that can only be taken away as a whole, and all units
that touch the same layers form a *group*. A group that cannot be narrowed says why. The others have been rehearsed: the
model ran with most of their units gone, and every channel arrived where it belongs.

    C channels of a layer, U units of a group, n channels of a layer that belong to one unit
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynnet.backbone.hooks import watching
from dynnet.backbone.modes import evaluating
from dynnet.backbone.twin import meta_twin
from dynnet.channels.following import Kept, Role, Tracer
from dynnet.channels.labels import HEADS, TOGETHER

_FEWEST = 4  # bundles of a group, where its units allow


@dataclass(frozen=True)
class Member:
    """One side of one layer, as part of a group.

    Attributes:
        layer: name of the module.
        role: "produces" channels (a convolution's or linear layer's outputs), "passes" them on one by one (batch norm,
            depthwise convolution), "mixes" them (layer norm, group norm, global response norm: passes them on, but
            every one depends on others), or "reads" them (a convolution's or linear layer's inputs).
        channels: (U, n) int64, the layer's channels that belong to each unit.
        width: C, of all channels on this side of the layer.
        pixels: positions at which the layer works, H * W or the tokens; 1 behind a pooling.
        grouped: one side of a grouped convolution, which makes group by group from what it reads.
    """

    layer: str
    role: Role
    channels: np.ndarray
    width: int
    pixels: int
    grouped: bool = False


class Number(NamedTuple):
    """What a module states that depends on how many units there are: a number of heads, or their width.

    Attributes:
        module: its name.
        key: of the attribute.
        per_unit: what one unit adds to it.
    """

    module: str
    key: str
    per_unit: int


@dataclass(frozen=True)
class Group:
    """Units that touch the same layers.

    Attributes:
        members: in the order in which they run.
        units: U.
        pinned: why the units cannot be narrowed; None where they can.
        coupled: the units of several blocks are tied by a residual sum, or travel past other layers.
        inputs: channels that its first layer reads.
        segment: how many of the `seen` modules had ended when its first layer ran.
        numbers: what modules state, and have to be told where units are taken away: these units are heads of attention.
    """

    members: tuple[Member, ...]
    units: int
    pinned: str | None
    coupled: bool
    inputs: int
    segment: int
    numbers: tuple[Number, ...] = ()

    def layers(self, role: Role) -> tuple[str, ...]:
        return tuple(member.layer for member in self.members if member.role == role)


def bundle(units: int, wanted: int) -> int:
    """How many of a group's units are switched or taken away together: as many as wanted, or a half of that, a quarter
    and so on in groups so narrow that there would be fewer than four bundles."""
    while wanted > 1 and units // wanted < _FEWEST:
        wanted //= 2
    return max(1, wanted)


def find_groups(model: nn.Module, input_size: tuple[int, ...], seen: Collection[str] = ()) -> list[Group]:
    """The channel groups of any model, in the order in which their first layers run.

    Args:
        model: takes one (B, *input_size) tensor.
        input_size: (C, H, W).
        seen: modules whose output something else reads as well, such as exits; their channels are pinned.
    """

    def follow(free: Sequence[_Narrowed]) -> tuple[Tracer, Exception | None]:
        with stating(model, {number: one.left * number.per_unit for one in free for number in one.group.numbers}):
            return _follow(model, input_size, seen, _narrow(free))

    model = meta_twin(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    tracer, error = follow([])
    if error is not None:
        raise error
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
        free = [_Narrowed(group, units, 2 + i % 3) for i, (group, units) in enumerate(able)]
        broken = _rehearse(follow, tracer, free, parent, kinds)
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
    model: nn.Module, input_size: tuple[int, ...], seen: Collection[str], kept: Mapping[tuple[str, Role], Kept]
) -> tuple[Tracer, Exception | None]:
    """What a dry run saw, and what stopped it."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tracer, modules = Tracer(seen, kept), dict(model.named_modules())
    with torch.inference_mode(False), evaluating(model), torch.no_grad():
        images = torch.empty(1, *input_size, dtype=dtype, device="meta")
        try:
            with watching(modules, tracer.enter, tracer.leave), tracer:
                output = model(images)
        except Exception as error:  # of any kind: it is the model's own forward
            return tracer, error
    for x in tree_leaves(output):
        if isinstance(x, Tensor):
            tracer.labels.pin(tracer.labels.of(x), "they are the model's answer")
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


# The rehearsal.


@dataclass(frozen=True)
class _Narrowed:
    group: Group
    units: frozenset[int]
    stride: int

    @property
    def left(self) -> int:
        return len(range(self.group.units)[1 :: self.stride])

    def kept(self) -> dict[tuple[str, Role], np.ndarray]:
        """Every so-many-th unit, without the first: a forward that counts from the left is found out as well."""
        return {(m.layer, m.role): m.channels[1 :: self.stride].ravel() for m in self.group.members}


_Follow = Callable[[Sequence[_Narrowed]], tuple[Tracer, Exception | None]]


def _rehearse(
    follow: _Follow, whole: Tracer, free: Sequence[_Narrowed], parent: np.ndarray, kinds: Mapping[str, type]
) -> dict[int, str]:
    """Run the model with most of the units gone.

    Args:
        follow: runs it.
        whole: the run with all units.
        free: groups to be narrowed.
        parent: of every label, the unit.
        kinds: classes of all modules.

    Returns:
        Units that cannot be taken away after all, and why: the forward between the layers needs their number, or what
        is left does not arrive where it belongs.
    """
    tracer, error = follow(free)
    broken: dict[int, str] = {}
    for atoms, where in whole.counted(tracer):
        for unit in np.unique(parent[atoms.numpy()]):
            broken.setdefault(int(unit), f"{where} computes with their number")
    for a, b, where in tracer.labels.ties:
        one, other = parent[a.numpy()], parent[b.numpy()]
        for unit in np.unique(np.concatenate([one[one != other], other[one != other]])):
            broken.setdefault(int(unit), f"where they arrive in {where} depends on their number")
    for atoms, reason in [*tracer.labels.pins, *((atoms, _needed(tracer)) for atoms in tracer.suspects)]:
        for unit in np.unique(parent[atoms.numpy()]):
            broken.setdefault(int(unit), reason)
    gone = frozenset[int]().union(*(one.units for one in free))
    broken = {unit: reason for unit, reason in broken.items() if unit in gone}
    if error is None:
        return broken
    if broken:
        read = frozenset(int(unit) for atoms in tracer.suspects for unit in parent[atoms.numpy()])
        return _alike(read, tracer, free, kinds) | broken
    if not free:
        raise error
    # Something that is not an operator counts channels. The groups before the culprit do no harm without it.
    works, fails = 0, len(free)
    while fails - works > 1:
        middle = (works + fails) // 2
        last, error = follow(free[:middle])
        works, fails = (middle, fails) if error is None else (works, middle)
        tracer = tracer if error is None else last
    culprit = free[fails - 1].units
    return _alike(culprit, tracer, free, kinds) | dict.fromkeys(culprit, _needed(tracer))


def _alike(
    read: frozenset[int], tracer: Tracer, free: Sequence[_Narrowed], kinds: Mapping[str, type]
) -> dict[int, str]:
    """Units at the same layers of other modules that are built like the one whose forward failed on what it read, class
    by class: the same code needs their number.

    It would be found out one by one, but a deep network has dozens of them, and every rehearsal runs the whole of it.
    """
    where = tracer.labels.where()
    if where not in kinds:
        return {}
    lost = {_inside(one.group, where) for one in free if not one.units.isdisjoint(read)} - {frozenset()}
    parts = _parts(kinds, where)
    found: dict[int, str] = {}
    for name, kind in kinds.items() if lost else ():
        if kind is kinds[where] and _parts(kinds, name) == parts:
            for one in free:
                if one.units.isdisjoint(read) and _inside(one.group, name) in lost:
                    found |= dict.fromkeys(one.units, f"the forward of {name} needs their number")
    return found


def _parts(kinds: Mapping[str, type], module: str) -> dict[str, type]:
    """The classes of a module's own modules."""
    start = module + "."
    return {name.removeprefix(start): kind for name, kind in kinds.items() if name.startswith(start)}


def _inside(group: Group, module: str) -> frozenset[tuple[str, Role]]:
    """The sides of a module's own layers that a group touches."""
    start = module + "."
    return frozenset((m.layer.removeprefix(start), m.role) for m in group.members if m.layer.startswith(start))


def _narrow(free: Sequence[_Narrowed]) -> dict[tuple[str, Role], Kept]:
    """What is left of every side of every layer."""
    widths = {(m.layer, m.role): m.width for one in free for m in one.group.members}
    there = {side: np.ones(width, dtype=bool) for side, width in widths.items()}
    for one in free:
        kept = one.kept()
        for member in one.group.members:
            side = (member.layer, member.role)
            there[side][member.channels.ravel()] = False
            there[side][kept[side]] = True
    return {side: Kept(torch.from_numpy(np.flatnonzero(on)), widths[side]) for side, on in there.items()}


def _needed(tracer: Tracer) -> str:
    return f"the forward of {tracer.labels.where()} needs their number"
