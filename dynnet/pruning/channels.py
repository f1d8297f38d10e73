"""`prune`: channels taken away for good. What is left is an ordinary, narrower model.

Units of channel groups are scored (`criteria/units.py`), the least needed go until the model costs what was asked for
(`choosing.py`), and every layer that they touch is cut (`narrowing.py`): those that make them, norms and depthwise
convolutions on the way, those that read them. Channels that residual sums tie go together. Groups keep a share of their
units, and widths stay multiples of 8 where layers are wide enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from torch import nn

from dynnet.backbone.batches import Batches, Loader, Loss
from dynnet.backbone.input_size import first_run, input_size_of
from dynnet.backbone.names import check_excluded, check_fields, check_list, is_inside, title
from dynnet.backbone.twin import copy_of
from dynnet.channels.finding import find_groups
from dynnet.channels.groups import Group
from dynnet.cost.widths import Costs
from dynnet.deploy.folding import fold
from dynnet.errors import PruneError
from dynnet.pruning.bare import check_bare
from dynnet.pruning.choosing import ROUNDING, Chunk, Place, choose, choose_by_time, chunks_of, gone, least_left
from dynnet.pruning.config import PruneConfig, Scope
from dynnet.pruning.criteria.units import find_criterion, score
from dynnet.pruning.narrowing import narrow_
from dynnet.pruning.shape import restate_


def prune(
    model: nn.Module,
    loader: Loader | None = None,
    config: PruneConfig | None = None,
    *,
    loss: Loss | None = None,
    between: Callable[[nn.Module], object] | None = None,
    of: nn.Module | None = None,
    input_size: tuple[int, int, int] | None = None,
    **fields: Any,
) -> nn.Module:
    """A narrower copy of a model.

    >>> import timm
    >>> backbone = timm.create_model("cifar_resnet20", num_classes=10)
    >>> slim = prune(backbone, macs=0.5, criterion="l1")
    >>> backbone.layer3[0].conv1, slim.layer3[0].conv1.out_channels < 64
    (Conv2d(32, 64, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False), True)

    Args:
        model: any timm classifier, or module from (B, C, H, W) images to (B, K) logits; left as it was.
        loader: batches of (images, labels), for criteria that look at data; shuffled, as only the first are looked at.
        config: what is taken away.
        loss: of logits (B, K) and labels (B,), a mean; by default cross-entropy.
        between: called with the model after every cut but the last, to fine-tune it.
        of: the model of which target and floor are shares; by default `model`; the first one where `model` has been
            pruned before.
        input_size: (C, H, W); by default what the model was made for.
        fields: the fields of `PruneConfig`, in place of the configuration's: a target, `macs=0.5`, `params=0.5` or
            `latency=0.5`, and how it is reached. Latency is that of one image on the device where the model is; what
            fits is found by cutting copies and timing them beside the model.

    Returns:
        The copy, in the model's mode. Batch norms have yet to see it (`dynnet.pruning.recalibrate_`).

    Raises:
        PruneError: nothing to prune, a target that cannot be met (with the least that can), an unknown criterion.
        DataError: a loader that is missing, empty or without labels.
        NonFiniteError: scores that are NaN or infinite.
    """
    config = _settled(config, fields)
    _check(model, config)
    size = input_size or input_size_of(model)
    if config.steps > 1 and isinstance(loader, Iterator):
        raise PruneError(
            f"steps={config.steps}, and the loader is an iterator, which is used up after the first; give a list"
        )
    batches = Batches(loader, config.batches, loss or nn.functional.cross_entropy, config.seed)
    cuts = _Cuts.of_model(model, model if of is None else of, config, batches, size)
    pruned = copy_of(model)
    for step in range(1, config.steps + 1):
        cuts.make_(pruned, step)
        if step < config.steps and between is not None:
            between(pruned)
            check_bare(pruned)
    restate_(pruned, model, size)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in pruned.named_modules():  # `between` may have left others
        module.training = modes.get(name, module.training)
    return pruned


def _settled(config: PruneConfig | None, fields: dict[str, Any]) -> PruneConfig:
    check_fields(fields, PruneConfig, "prune()", PruneError, ["loss", "between", "of", "input_size"])
    if "exclude" in fields:
        check_list("exclude", fields["exclude"], PruneError)
        fields = {**fields, "exclude": tuple(fields["exclude"])}
    return replace(config or PruneConfig(), **fields)


def _check(model: nn.Module, config: PruneConfig) -> None:
    check_bare(model)
    find_criterion(config.criterion)
    kind, share = config.target
    if not 0 < share <= 1:
        raise PruneError(f"{kind}={share}: give a share of the model's in (0, 1]")
    if not 0 <= config.floor < 1:
        raise PruneError(f"floor={config.floor}: give the share of its units that every group keeps, in [0, 1)")
    if config.multiple < 1 or config.steps < 1:
        raise PruneError(f"multiple={config.multiple}, steps={config.steps}: give numbers of 1 or more")
    if config.scope not in get_args(Scope):
        raise PruneError(f"scope={config.scope!r}: choose from {', '.join(get_args(Scope))}")
    check_excluded(config.exclude, dict(model.named_modules()), title(model), PruneError)


@dataclass
class _Cuts:
    """The cuts of one model, one after the other.

    Attributes:
        name: of the model, for messages.
        of: the model of which target and floor are shares.
        config: what is taken away.
        batches: what criteria look at.
        size: (C, H, W) of the images.
        whole: what `of` costs.
        begin: what the model costs before the first cut, as a share of that.
        least: how many blocks of units each group keeps at least; None until the first cut has found the groups.
    """

    name: str
    of: nn.Module
    config: PruneConfig
    batches: Batches
    size: tuple[int, int, int]
    whole: float
    begin: float
    least: dict[Place, int] | None

    @classmethod
    def of_model(
        cls, model: nn.Module, of: nn.Module, config: PruneConfig, batches: Batches, size: tuple[int, int, int]
    ) -> _Cuts:
        unit = _unit(config)
        with first_run(model, size, PruneError):
            whole = Costs(of, [], size, unit).whole
        same = of is model
        begin = 1.0 if same or config.latency is not None else Costs(model, [], size, unit).whole / whole
        least = None if same else least_left(of, _groups(of, config, size), config)
        return cls(title(model), of, config, batches, size, whole, begin, least)

    def make_(self, model: nn.Module, step: int) -> None:
        """One of the cuts, in place."""
        _, target = self.config.target
        goal = self.begin * min(1.0, target / self.begin) ** (step / self.config.steps)
        groups = _groups(model, self.config, self.size)
        if self.least is None:
            self.least = least_left(model, groups, self.config)
        scores = score(model, groups, self.config.criterion, self.batches)
        chunks = chunks_of(model, groups, scores, self.config, self.least)
        costs = Costs(model, groups, self.size, _unit(self.config))
        if step == 1:
            self._check_reach(groups, chunks, costs)
        narrow_(model, groups, self._stay(model, groups, chunks, costs, goal))

    def _stay(
        self, model: nn.Module, groups: list[Group], chunks: list[Chunk], costs: Costs, goal: float
    ) -> list[np.ndarray]:
        """(U,) bool for each group: the units that stay."""
        if self.config.latency is not None:
            return choose_by_time(model, groups, chunks, costs, goal, fold(self.of, self.size), self.size)
        return choose(groups, chunks, costs, self.whole * goal)

    def _check_reach(self, groups: list[Group], chunks: list[Chunk], costs: Costs) -> None:
        kind, target = self.config.target
        least = costs.without(gone(groups, chunks)) / self.whole
        if kind != "latency" and least > target * ROUNDING:
            raise PruneError(
                f"{kind}={target:g} is out of reach for {self.name}: with all channels gone that may go, it still "
                f"costs {least:.3f}"
            )


def _unit(config: PruneConfig) -> str:
    """What is counted; time is found by way of MACs."""
    return "params" if config.params is not None else "macs"


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
