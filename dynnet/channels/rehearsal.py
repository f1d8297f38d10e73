"""A rehearsal: does a model's forward go along when most of the units of its channel groups are gone?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dynnet.channels.following import Kept, Role, Tracer
from dynnet.channels.groups import Group


@dataclass(frozen=True)
class Narrowed:
    """A group in a rehearsal, of whose units every so-many-th stays."""

    group: Group
    units: frozenset[int]
    stride: int

    @property
    def left(self) -> int:
        return len(range(self.group.units)[1 :: self.stride])

    def kept(self) -> dict[tuple[str, Role], np.ndarray]:
        """Every so-many-th unit, without the first: a forward that counts from the left is found out as well."""
        return {(m.layer, m.role): m.channels[1 :: self.stride].ravel() for m in self.group.members}


Follow = Callable[[Sequence[Narrowed]], tuple[Tracer, Exception | None]]


def rehearse(
    follow: Follow, whole: Tracer, free: Sequence[Narrowed], parent: np.ndarray, kinds: Mapping[str, type]
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
    gone = frozenset[int]().union(*(one.units for one in free))
    broken = {unit: reason for unit, reason in _misplaced(whole, tracer, parent).items() if unit in gone}
    if error is None:
        return broken
    if broken:
        read = frozenset(int(unit) for atoms in tracer.suspects for unit in parent[atoms.numpy()])
        return _alike(read, tracer, free, kinds) | broken
    if not free:
        raise error
    culprit, tracer = _culprit(follow, free, tracer)
    return _alike(culprit, tracer, free, kinds) | dict.fromkeys(culprit, _needed(tracer))


def _misplaced(whole: Tracer, tracer: Tracer, parent: np.ndarray) -> dict[int, str]:
    """Units whose number was computed with, that arrived beside others, or that were pinned, and why."""
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
    return broken


def _culprit(follow: Follow, free: Sequence[Narrowed], tracer: Tracer) -> tuple[frozenset[int], Tracer]:
    """The units without which something that is not an operator fails, and the run that failed on them: the groups
    before them do no harm."""
    works, fails = 0, len(free)
    while fails - works > 1:
        middle = (works + fails) // 2
        last, error = follow(free[:middle])
        works, fails = (middle, fails) if error is None else (works, middle)
        tracer = tracer if error is None else last
    return free[fails - 1].units, tracer


def _alike(read: frozenset[int], tracer: Tracer, free: Sequence[Narrowed], kinds: Mapping[str, type]) -> dict[int, str]:
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


def narrow(free: Sequence[Narrowed]) -> dict[tuple[str, Role], Kept]:
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
