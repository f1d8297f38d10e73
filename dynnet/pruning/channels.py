"""Channels taken away for good: what is left is an ordinary, narrower model.

Units of channel groups are scored (`units.py`), the least needed go until the model costs what was asked for, and
every layer that they touch is cut: those that make them, norms and depthwise convolutions on the way, those that read
them. Channels that residual sums tie go together. Groups keep a share of their units, and widths stay multiples of 8
where layers are wide enough.

    U units of a group, C channels of a layer
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import nn

from dynnet.backbone.input_size import first_run, input_size_of
from dynnet.backbone.names import check_excluded, check_list, is_inside, title
from dynnet.channels.groups import Group, bundle, find_groups
from dynnet.channels.slicing import Subset, cut, subset
from dynnet.cost.widths import Costs, Side
from dynnet.deploy.folding import fold
from dynnet.errors import PruneError
from dynnet.pruning.bare import check_bare
from dynnet.pruning.batches import Batches, Loader, Loss
from dynnet.pruning.criteria.units import Scores, find_criterion, score
from dynnet.pruning.shape import restate
from dynnet.pruning.timed import time_share

Scope = Literal["global", "group"]

_TINY = torch.finfo(torch.float64).tiny
TARGETS = ("macs", "params", "latency")
_ROUNDING = 1 + 1e-9  # what is as large as its goal meets it
_TRIALS = 6  # cuts that are timed, to find the one that is fast enough


@dataclass(frozen=True)
class PruneConfig:
    """What is taken away.

    Attributes:
        criterion: a name from `dynnet.pruning.CRITERIA`.
        macs: target, as a share of the model's MACs; or
        params: as a share of its parameters; or
        latency: as a share of the time that it takes for one image, folded, measured here and now. One of the three.
        scope: "global" ranks the units of all groups together, "group" takes the same share of each.
        floor: share of its units that every group keeps.
        multiple: widths stay multiples of this; of half of it, a quarter, where a group is too narrow for four steps.
        exclude: modules, by name, whose channels stay.
    """

    criterion: str = "taylor"
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    scope: Scope = "global"
    floor: float = 0.1
    multiple: int = 8
    exclude: tuple[str, ...] = ()

    @property
    def target(self) -> tuple[str, float]:
        """What is aimed at, and its share."""
        given = [(key, share) for key in TARGETS if (share := getattr(self, key)) is not None]
        if len(given) != 1:
            told = ", ".join(f"{key}={share:g}" for key, share in given) or "no target"
            raise PruneError(f"got {told}: give one of {', '.join(TARGETS)}")
        return cast(tuple[str, float], given[0])


def prune(
    model: nn.Module,
    loader: Loader | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    criterion: str = "taylor",
    scope: Scope = "global",
    floor: float = 0.1,
    multiple: int = 8,
    exclude: Sequence[str] = (),
    batches: int = 10,
    loss: Loss | None = None,
    steps: int = 1,
    between: Callable[[nn.Module], object] | None = None,
    of: nn.Module | None = None,
    input_size: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A narrower copy of a model.

    Args:
        model: any timm classifier, or module from (B, C, H, W) images to (B, K) logits; left as it was.
        loader: batches of (images, labels), for criteria that look at data; shuffled, as only the first are looked at.
        macs, params, latency: target, as a share of the model's; give one of the three. Latency is that of one image on
            the device where the model is; what fits is found by cutting copies and timing them beside the model.
        criterion, scope, floor, multiple, exclude: see `PruneConfig`.
        batches: how many of the loader's are looked at.
        loss: of logits (B, K) and labels (B,), a mean; by default cross-entropy.
        steps: reach the target in so many cuts, scoring anew before each.
        between: called with the model after every cut but the last, to fine-tune it.
        of: the model of which target and floor are shares; by default `model`; the first one where `model` has been
            pruned before.
        input_size: (C, H, W); by default what the model was made for.
        seed: of what is random in a criterion.

    Returns:
        The copy, in the model's mode. Batch norms have yet to see it (`dynnet.pruning.recalibrate`).

    Raises:
        PruneError: nothing to prune, a target that cannot be met (with the least that can), an unknown criterion.
        DataError: a loader that is missing, empty or without labels.
        NonFiniteError: scores that are NaN or infinite.
    """
    check_list("exclude", exclude, PruneError)
    config = PruneConfig(criterion, macs, params, latency, scope, floor, multiple, tuple(exclude))
    given = Batches(loader, batches, loss or nn.functional.cross_entropy, seed)
    size = _check(model, config, steps, input_size)
    if steps > 1 and isinstance(loader, Iterator):
        raise PruneError(f"steps={steps}, and the loader is an iterator, which is used up after the first; give a list")
    pruned, of = copy.deepcopy(model), model if of is None else of
    modes = {name: module.training for name, module in model.named_modules()}
    kind, target = config.target
    unit = "macs" if kind == "latency" else kind
    with first_run(model, size, PruneError):
        whole = Costs(of, [], size, unit).whole
    begin = 1.0 if of is model or kind == "latency" else Costs(model, [], size, unit).whole / whole
    least_left = None if of is model else _least_left(of, _groups(of, config, size), config)
    for step in range(1, steps + 1):
        goal = begin * min(1.0, target / begin) ** (step / steps)
        groups = _groups(pruned, config, size)
        if least_left is None:
            least_left = _least_left(pruned, groups, config)
        costs = Costs(pruned, groups, size, unit)
        chunks = _chunks(pruned, groups, score(pruned, groups, criterion, given), config, least_left)
        if kind == "latency":
            stay = _choose_by_time(pruned, groups, chunks, costs, goal, fold(of, size), size)
        elif step == 1 and (least := costs.without(_gone(groups, chunks)) / whole) > target * _ROUNDING:
            raise PruneError(
                f"{kind}={target:g} is out of reach for {title(model)}: with all channels gone that may go, it still "
                f"costs {least:.3f}"
            )
        else:
            stay = _choose(groups, chunks, costs, whole * goal)
        narrow(pruned, groups, stay)
        if step < steps and between is not None:
            between(pruned)
            check_bare(pruned)
    restate(pruned, model, size)
    for name, module in pruned.named_modules():  # `between` may have left others
        module.training = modes.get(name, module.training)
    return pruned


def _check(
    model: nn.Module, config: PruneConfig, steps: int, input_size: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    check_bare(model)
    find_criterion(config.criterion)
    kind, share = config.target
    if not 0 < share <= 1:
        raise PruneError(f"{kind}={share}: give a share of the model's in (0, 1]")
    if not 0 <= config.floor < 1:
        raise PruneError(f"floor={config.floor}: give the share of its units that every group keeps, in [0, 1)")
    if config.multiple < 1 or steps < 1:
        raise PruneError(f"multiple={config.multiple}, steps={steps}: give numbers of 1 or more")
    if config.scope not in get_args(Scope):
        raise PruneError(f"scope={config.scope!r}: choose from {', '.join(get_args(Scope))}")
    check_excluded(config.exclude, dict(model.named_modules()), title(model), PruneError)
    return input_size or input_size_of(model)


def _groups(model: nn.Module, config: PruneConfig, size: tuple[int, ...]) -> list[Group]:
    """Groups that can be narrowed.

    Raises:
        PruneError: there are none, and why.
    """
    every = find_groups(model, size)
    found, told = [], []
    for group in every:
        inside = [member.layer for member in group.members if is_inside(member.layer, config.exclude)]
        if group.pinned is not None:
            told.append(group.pinned)
        elif inside:
            told.append(f"{inside[0]} is excluded")
        elif group.units > 1 and group.layers("produces"):
            found.append(group)
    if not found:
        why = "; ".join(list(dict.fromkeys(told))[:4]) or "no layer reads what another one makes"
        raise PruneError(f"{title(model)} has no channels to take away: {why}")
    return found


def _least_left(model: nn.Module, groups: Sequence[Group], config: PruneConfig) -> dict[Side, int]:
    """How many blocks of units each group keeps at least, by the side of the first layer that it touches."""
    blocks = {_side(group): len(np.unique(bound_units(model, group))) for group in groups}
    return {side: max(1, math.ceil(config.floor * count)) for side, count in blocks.items()}


def _side(group: Group) -> Side:
    return group.members[0].layer, group.members[0].role


class _Chunk(NamedTuple):
    """Units of one group that go together."""

    rank: float  # what they are worth: those of the lowest go first
    group: int
    units: np.ndarray


def _chunks(
    model: nn.Module, groups: Sequence[Group], scores: Scores, config: PruneConfig, least_left: Mapping[Side, int]
) -> list[_Chunk]:
    """What can go, in the order in which it goes."""
    comparable = find_criterion(config.criterion).comparable
    chunks: list[_Chunk] = []
    for number, (group, worth) in enumerate(zip(groups, scores, strict=True)):
        if worth is None:
            continue
        values = (worth if comparable else worth / worth.mean().clamp(min=_TINY)).numpy()
        bound = bound_units(model, group)
        blocks = [np.flatnonzero(bound == b) for b in np.unique(bound)]
        blocks.sort(key=lambda units: float(values[units].mean()))
        made = next(m for m in group.members if m.role == "produces").channels.size // len(blocks)
        step = bundle(len(blocks), config.multiple // made)
        least = least_left.get(_side(group), 1)
        first = 0
        # The first may be a smaller one, after which the width is a multiple.
        for end in range(len(blocks) % step or step, len(blocks) - least + 1, step):
            units = np.concatenate(blocks[first:end])
            rank = float(values[units].mean()) if config.scope == "global" else end / len(blocks)
            chunks.append(_Chunk(rank, number, units))
            first = end
    return sorted(chunks, key=lambda chunk: chunk.rank)


def _choose(groups: Sequence[Group], chunks: Sequence[_Chunk], costs: Costs, goal: float) -> list[np.ndarray]:
    """(U,) bool for each group: the units that stay, those worth most at a cost of no more than the goal."""

    def fits(taken: Sequence[_Chunk]) -> bool:
        return costs.without(_gone(groups, taken)) <= goal * _ROUNDING

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


def _choose_by_time(
    model: nn.Module,
    groups: Sequence[Group],
    chunks: Sequence[_Chunk],
    costs: Costs,
    goal: float,
    dense: nn.Module,
    size: tuple[int, int, int],
) -> list[np.ndarray]:
    """As `_choose`: the units that stay so that one image takes no more than this share of the time that it takes in a
    dense model, which is folded."""

    def tried(macs: float) -> tuple[list[np.ndarray], float]:
        stay = _choose(groups, chunks, costs, macs)
        narrower = copy.deepcopy(model)
        narrow(narrower, groups, stay)
        return stay, time_share(fold(narrower, size), dense, size)

    low, high = costs.without(_gone(groups, chunks)), float(costs.whole)
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


def _gone(groups: Sequence[Group], chunks: Sequence[_Chunk]) -> dict[Side, int]:
    """How many channels of every side of every layer are gone."""
    units = Counter[int]()
    for chunk in chunks:
        units[chunk.group] += len(chunk.units)
    gone = Counter[Side]()
    for number, count in units.items():
        for member in groups[number].members:
            gone[member.layer, member.role] += count * member.channels.shape[1]
    return gone


def bound_units(model: nn.Module, group: Group) -> np.ndarray:
    """(U,) a number for each unit; units with the same one go together, so that group norms lose whole groups."""
    bound = np.arange(group.units)
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if isinstance(layer, nn.GroupNorm) and layer.num_groups > 1:
            of_channel = member.channels // (layer.num_channels // layer.num_groups)
            for number in np.unique(of_channel):
                touched = bound[(of_channel == number).any(1)]
                bound[np.isin(bound, touched)] = touched.min()
    return bound


def narrow(model: nn.Module, groups: Sequence[Group], stay: Sequence[np.ndarray]) -> None:
    """Cut every layer to the channels that stay, in place.

    Args:
        model: whose groups they are.
        groups: without a reason to be left alone.
        stay: for each group (U,) bool, at least one.
    """
    there: dict[Side, np.ndarray] = {}
    for group, mask in zip(groups, stay, strict=True):
        for member in group.members:
            side = there.setdefault((member.layer, member.role), np.ones(member.width, dtype=bool))
            side[member.channels[~mask].ravel()] = False
    modules = dict(model.named_modules())
    for layer in dict.fromkeys(layer for layer, _ in there):
        left = {role: _subset(mask) for (name, role), mask in there.items() if name == layer}
        through = left.get("passes") or left.get("mixes")
        cut(modules[layer], left.get("reads") or through, left.get("produces"))
    for group, mask in zip(groups, stay, strict=True):
        for number in group.numbers:
            setattr(modules[number.module], number.key, int(mask.sum()) * number.per_unit)


def _subset(there: np.ndarray) -> Subset | None:
    return None if there.all() else subset(torch.from_numpy(np.flatnonzero(there)), len(there))
