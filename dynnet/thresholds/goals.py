"""What thresholds are chosen for: goals, each of which picks an operating point from the same table of answers.

The best of many points is lucky on the samples that it was chosen on. What new samples will give is therefore told by
cross-validation: thresholds fitted on all folds but one are tried on that one.

    N samples, E exits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from dynnet.errors import CalibrationError
from dynnet.model import DynamicModel
from dynnet.thresholds.search import explore, frontier, trade_off
from dynnet.thresholds.table import OperatingPoint, Table

_FOLDS = 5


class Drop(NamedTuple):
    """How far accuracy falls below never exiting on new samples, and the standard error of that estimate."""

    mean: float
    error: float


class Choice(NamedTuple):
    """What a goal has picked, and what it will lose on new samples; None where samples are too few to tell."""

    point: OperatingPoint
    drop: Drop | None


@dataclass(frozen=True)
class Goal(ABC):
    """What thresholds are chosen for.

    Attributes:
        value: what is asked for.
        name: as a keyword of `dynnet.calibrate`.
    """

    value: float
    name: ClassVar[str]

    @abstractmethod
    def check(self, model: DynamicModel) -> None:
        """Refuse what no samples could reach.

        Raises:
            CalibrationError: it is out of range, or below what the cheapest sample costs.
        """

    @abstractmethod
    def choose(self, table: Table) -> Choice:
        """The operating point for this goal.

        Raises:
            CalibrationError: none reaches it on these samples.
        """


class Budget(Goal):
    """Mean MACs per sample, as a share of the bare backbone's. The best accuracy within it is taken; where the samples
    cannot tell the difference, the thresholds that spend more."""

    name = "budget"

    def check(self, model: DynamicModel) -> None:
        dense, floor = model.ledger().dense, model.floor()
        if not self.value * dense >= floor:
            what = [f"leaving at the first exit {model.exits[0]!r}"] if model.exits else []
            what += ["what gates cannot switch, and the gates themselves"] if model.gates is not None else []
            raise CalibrationError(
                f"a budget of {self.value} of the dense MACs cannot be met: {', with '.join(what)} costs "
                f"{floor / dense:.3f} already; give at least that{', or put an exit earlier' if model.exits else ''}"
            )

    def choose(self, table: Table) -> Choice:
        points, dense = explore(table), table.ledger.dense
        within = [point for point in points if point.macs <= self.value * dense]
        if not within:
            least = min(point.macs for point in points) / dense
            raise CalibrationError(
                f"a budget of {self.value} of the dense MACs cannot be met on these samples: the least is {least:.3f}; "
                f"are exits giving NaN?"
            )
        point = _spending(table, within)
        return Choice(point, next(iter(_expected_drops(table, [point.macs])), None))


class AccuracyDrop(Goal):
    """How far accuracy may fall below never exiting on new samples. The fewest MACs are taken at which the drop, as
    cross-validation sees it, plus its standard error stays within."""

    name = "accuracy_drop"

    def check(self, model: DynamicModel) -> None:
        if not 0 <= self.value < 1:
            raise CalibrationError(f"accuracy_drop={self.value}: give a share in [0, 1), 0.005 for half a point")

    def choose(self, table: Table) -> Choice:
        """From the dearest point on, as long as all is well: a cheap one that looks well by luck is not reached."""
        points = frontier(explore(table))
        choice = Choice(table.point((np.inf,) * table.exits), Drop(0.0, 0.0))
        drops = _expected_drops(table, [point.macs for point in points])
        if not drops:
            raise CalibrationError(
                f"{table.samples} samples are too few to bound an accuracy drop; give at least {2 * _FOLDS}"
            )
        for point, drop in zip(reversed(points), reversed(drops), strict=True):
            if drop.mean + drop.error > self.value:
                break
            if point.macs < choice.point.macs:
                choice = Choice(point, drop)
        return choice


GOALS: dict[str, type[Goal]] = {goal.name: goal for goal in (Budget, AccuracyDrop)}


def _spending(table: Table, points: Sequence[OperatingPoint]) -> OperatingPoint:
    """Of the points as good as the best, to two standard errors of the difference, the dearest.

    The best of many is lucky on these samples; new ones are better served by more compute, which the budget allows.
    """
    answers = table.answers
    best = answers.right(max(points, key=lambda p: p.accuracy).thresholds).astype(np.int64)
    equals = []
    for point in points:
        lost = best - answers.right(point.thresholds)
        if lost.mean() <= 2 * _error(lost):
            equals.append(point)
    return max(equals, key=lambda p: (p.macs, p.accuracy))


def _error(lost: np.ndarray) -> np.ndarray:
    """Standard error of the mean along the last axis, of numbers that are -1, 0 or 1.

    One change more than was seen: to have seen none in few samples promises little.
    """
    return np.sqrt((lost**2).sum(-1) + 1) / lost.shape[-1]


def _expected_drops(table: Table, levels: Sequence[float]) -> list[Drop]:
    """For each level of mean MACs, by cross-validation; empty where samples are too few."""
    samples = table.samples
    if samples < 2 * _FOLDS:
        return []
    lost = np.zeros((len(levels), samples))
    order = np.random.default_rng(0).permutation(samples)
    for fold in np.array_split(order, _FOLDS):
        fitted = trade_off(table.subset(np.setdiff1d(order, fold)))
        unseen = table.answers.subset(fold)
        for k, level in enumerate(levels):
            # Points come in order of their MACs.
            point = next((p for p in reversed(fitted) if p.macs <= level), fitted[0])
            lost[k, fold] = unseen.lost(point.thresholds)
    return [Drop(float(mean), float(error)) for mean, error in zip(lost.mean(1), _error(lost), strict=True)]
