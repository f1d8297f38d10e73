"""Modules that can run once for each width, on some of the samples: all that goes in and comes out is handed over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dynnet.backbone.dry_run import Call, Leaf, Trace

Place = tuple[int, int, int]  # position among leaves, dimension of the batch, entries per sample


class Room(NamedTuple):
    """A module between two exits, nothing of which is seen elsewhere but what it returns.

    Attributes:
        name: of the module.
        segment: exits that are passed before it.
        takes, gives: as of `dynnet.gates.plan.Container`.
    """

    name: str
    segment: int
    takes: tuple[Place, ...]
    gives: tuple[Place, ...]


def rooms(seen: Trace, ends: Sequence[int]) -> list[Room]:
    """The outermost such modules behind the first exit, in running order.

    Args:
        seen: a dry run of the backbone.
        ends: the clock at which each exit's boundary is done, rising.
    """
    found: list[Room] = []
    until = -1
    for call in sorted(seen.once().values(), key=lambda call: (call.begin, -call.end)):
        segment = sum(end <= call.begin for end in ends)
        stop = ends[segment] if segment < len(ends) else math.inf
        if segment == 0 or call.begin < until or call.end > stop or call.end == call.begin:
            continue
        room = _room(seen, call, segment)
        if room is not None:
            found.append(room)
            until = call.end
    return found


def _room(seen: Trace, call: Call, segment: int) -> Room | None:
    """What a call is, if it can run on some of the samples."""
    outputs = set(call.outputs)
    for tensor, life in seen.lives.items():
        made_inside = call.begin < life.made <= call.end
        if made_inside and life.last_read > call.end and tensor not in outputs:
            return None  # somebody else sees it
        handed = life.made > call.begin or tensor in call.inputs.values()
        if not handed and any(call.begin < clock <= call.end for clock, _ in life.readers):
            return None  # it reads what it was not handed
    takes = {at: seen.lives[tensor].leaf for at, tensor in call.inputs.items() if tensor in seen.lives}
    gives = {at: leaf for at, leaf in enumerate(call.leaves) if leaf.batch_dim is not None}
    if not takes or not gives or not all(leaf.together for leaf in (*takes.values(), *gives.values())):
        return None
    return Room(call.name, segment, _places(takes), _places(gives))


def _places(leaves: dict[int, Leaf]) -> tuple[Place, ...]:
    return tuple((at, leaf.batch_dim or 0, leaf.per_sample) for at, leaf in sorted(leaves.items()))
