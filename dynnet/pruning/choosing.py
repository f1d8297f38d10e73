"""Which units of channels go: the least needed, until the model costs what was asked for.

U units of a group, C channels of a layer
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dynnet.backbone.names import title
from dynnet.backbone.twin import copy_of
from dynnet.channels.following import Role
from dynnet.channels.groups import Group, bundle
from dynnet.cost.widths import Costs
from dynnet.deploy.folding import fold
from dynnet.errors import PruneError
from dynnet.pruning.config import PruneConfig
from dynnet.pruning.criteria.units import Scores, find_criterion
from dynnet.pruning.narrowing import bound_units, narrow_
from dynnet.pruning.timed import time_share

Place = tuple[str, Role]  # a side of a layer

_TINY = torch.finfo(torch.float64).tiny
ROUNDING = 1 + 1e-9  # what is as large as its goal meets it
_TRIALS = 6  # cuts that are timed, to find the one that is fast enough


def least_left(model: nn.Module, groups: Sequence[Group], config: PruneConfig) -> dict[Place, int]:
    """How many blocks of units each group keeps at least, by the side of the first layer that it touches."""
    blocks = {_place(group): len(np.unique(bound_units(model, group))) for group in groups}
    return {side: max(1, math.ceil(config.floor * count)) for side, count in blocks.items()}


def _place(group: Group) -> Place:
    return group.members[0].layer, group.members[0].role


class Chunk(NamedTuple):
    """Units of one group that go together."""

    rank: float  # what they are worth: those of the lowest go first
    group: int
    units: np.ndarray


def chunks_of(
    model: nn.Module, groups: Sequence[Group], scores: Scores, config: PruneConfig, least: Mapping[Place, int]
) -> list[Chunk]:
    """What can go, in the order in which it goes."""
    comparable = find_criterion(config.criterion).comparable
    chunks: list[Chunk] = []
    for number, (group, worth) in enumerate(zip(groups, scores, strict=True)):
        if worth is None:
            continue
        values = (worth if comparable else worth / worth.mean().clamp(min=_TINY)).numpy()
        bound = bound_units(model, group)
        blocks = [np.flatnonzero(bound == b) for b in np.unique(bound)]
        blocks.sort(key=lambda units: float(values[units].mean()))
        made = next(m for m in group.members if m.role == "produces").channels.size // len(blocks)
        step = bundle(len(blocks), config.multiple // made)
        fewest = least.get(_place(group), 1)
        first = 0
        # The first may be a smaller one, after which the width is a multiple.
        for end in range(len(blocks) % step or step, len(blocks) - fewest + 1, step):
            units = np.concatenate(blocks[first:end])
            rank = float(values[units].mean()) if config.scope == "global" else end / len(blocks)
            chunks.append(Chunk(rank, number, units))
            first = end
    return sorted(chunks, key=lambda chunk: chunk.rank)


def choose(groups: Sequence[Group], chunks: Sequence[Chunk], costs: Costs, goal: float) -> list[np.ndarray]:
    """(U,) bool for each group: the units that stay, those worth most at a cost of no more than the goal."""

    def fits(taken: Sequence[Chunk]) -> bool:
        return costs.without(gone(groups, taken)) <= goal * ROUNDING

    few, many = 0, len(chunks)
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(chunks[:middle]) else (middle + 1, many)
    taken = list(chunks[:many])
    # The last one may have been large: what fits is put back, the most valuable first.
    for number in dict.fromkeys(chunk.group for chunk in reversed(chunks[:many])):
        while mine := [chunk for chunk in taken if chunk.group == number]:
            rest = [chunk for chunk in taken if chunk is not mine[-1]]
            if not fits(rest):
                break
            taken = rest
    stay = [np.ones(group.units, dtype=bool) for group in groups]
    for chunk in taken:
        stay[chunk.group][chunk.units] = False
    return stay


def choose_by_time(
    model: nn.Module,
    groups: Sequence[Group],
    chunks: Sequence[Chunk],
    costs: Costs,
    goal: float,
    dense: nn.Module,
    size: tuple[int, int, int],
) -> list[np.ndarray]:
    """As `choose`: the units that stay so that one image takes no more than this share of the time that it takes in a
    dense model, which is folded."""

    def tried(macs: float) -> tuple[list[np.ndarray], float]:
        stay = choose(groups, chunks, costs, macs)
        narrower = copy_of(model)
        narrow_(narrower, groups, stay)
        return stay, time_share(fold(narrower, size), dense, size)

    low, high = costs.without(gone(groups, chunks)), float(costs.whole)
    best, share = tried(high)
    if share <= goal:
        return best
    best, share = tried(low)
    if share > goal:
        raise PruneError(
            f"latency={goal:g} is out of reach for {title(model)}: with all channels gone that may go, one image still "
            f"takes {share:.3f} of the time"
        )
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        stay, share = tried(middle)
        if share <= goal:
            best, low = stay, middle
        else:
            high = middle
    return best


def gone(groups: Sequence[Group], chunks: Sequence[Chunk]) -> dict[Place, int]:
    """How many channels of every side of every layer are gone."""
    units = Counter[int]()
    for chunk in chunks:
        units[chunk.group] += len(chunk.units)
    missing = Counter[Place]()
    for number, count in units.items():
        for member in groups[number].members:
            missing[member.layer, member.role] += count * member.channels.shape[1]
    return missing
