"""What thresholds are chosen for: goals, each of which picks an operating point from the same table of answers.

The best of many points is lucky on the samples that it was chosen on. What new samples will give is therefore told by
other samples: a budget by cross-validation, a risk by a test on one half of a sequence that was learnt on the other.

    N samples, E exits
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self, get_args

import numpy as np

from dynnet.certificate import Harm
from dynnet.deploy import engines
from dynnet.deploy.stage_times import StageTimes
from dynnet.deploy.whole import fits_a_graph
from dynnet.errors import CalibrationError
from dynnet.model import DynamicModel
from dynnet.thresholds.certified import safe_steps, samples_needed
from dynnet.thresholds.clocked import Clocked
from dynnet.thresholds.search import explore, frontier, trade_off
from dynnet.thresholds.table import OperatingPoint, Table

_FOLDS = 5
_NEARLY = 0.95  # of what is spent at most


class Drop(NamedTuple):
    """How far accuracy falls below never exiting on new samples, and the standard error of that estimate."""

    mean: float
    error: float


class Verdict(NamedTuple):
    """Of an exact test of thresholds, on samples that they were not chosen on.

    Attributes:
        failures, samples: k of n were harmed.
        needed: None where it was passed by thresholds at which anybody exits; else so many samples, for choosing and
            testing, may pass it; 0 where no number will, for the exits do more harm than was asked for.
    """

    failures: int
    samples: int
    needed: int | None


class Choice(NamedTuple):
    """What a goal has picked.

    Attributes:
        point: the thresholds, and what they give.
        drop: what they will lose on new samples; None where samples are too few to tell.
        verdict: that a risk rests on.
        clocked: where the goal is one of time.
    """

    point: OperatingPoint
    drop: Drop | None
    verdict: Verdict | None = None
    clocked: Clocked | None = None


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

    def prepared(self, model: DynamicModel) -> Self:
        """This goal, when it knows what it needs to know of a model."""
        return self

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
        _check_labels(table, self.name)
        what = f"a budget of {self.value} of the dense MACs"
        point = _best_within(table, explore(table), self.value, table.ledger.dense, what, "are exits giving NaN?")
        return Choice(point, _expected_drop(table, point.macs))


@dataclass(frozen=True)
class Latency(Goal):
    """Mean time of a batch in an engine, as a share of the bare backbone's there. The best accuracy within it is taken,
    as with a budget; an exit whose head takes more time than it saves is switched off.

    Attributes:
        engine: as for `dynnet.export`.
        batch_size: B.
        times: of the model's stages there.
    """

    engine: str = "onnxruntime"
    batch_size: int = 1
    times: StageTimes | None = field(default=None, compare=False)
    name = "latency"

    def check(self, model: DynamicModel) -> None:
        if not (0 < self.value < math.inf and self.batch_size >= 1):
            raise CalibrationError(
                f"latency={self.value} in batches of {self.batch_size}: give a share of the bare backbone's time, such "
                f"as 0.5, and at least one image"
            )
        engines.engine(self.engine)
        if not fits_a_graph(model.measure, model.num_classes):
            raise CalibrationError(
                f"the measure {model.measure.name!r} is Python code, which no engine runs, and its time is not told; "
                f"give budget=, or a measure that torch.export takes"
            )

    def prepared(self, model: DynamicModel) -> Self:
        return replace(self, times=StageTimes.of(model, self.engine, self.batch_size))

    def choose(self, table: Table) -> Choice:
        assert self.times is not None
        _check_labels(table, self.name)
        # Gates close channels in PyTorch; in an engine they only cost what stands in the stages' times.
        timed = replace(table, ledger=self.times.ledger(), answers=replace(table.answers, gated=None))
        found = [point.thresholds for point in explore(timed)]
        while True:
            point = self._best(timed, found)
            running = tuple(table.measure.running(point.thresholds))
            if running in self.times.measured or not any(running):
                break
            self.times.learn(running)  # what is chosen was measured
        drop = _expected_drop(timed, point.macs)
        times = self.times
        about = times.engine, times.threads, times.batch_size, float(times.dense[-1])
        clocked = Clocked(*about, self._ms(timed, point.thresholds))
        return Choice(table.point(point.thresholds), drop, clocked=clocked)

    def _best(self, timed: Table, found: Sequence[tuple[float, ...]]) -> OperatingPoint:
        """Of some thresholds those for this goal, with nanoseconds of a sample in place of MACs."""
        assert self.times is not None
        each = 1e6 / self.batch_size
        points = [replace(timed.point(t), macs=self._ms(timed, t) * each) for t in found]
        dense = float(self.times.dense[-1]) * each
        what = f"{self.value} of the bare backbone's time in {self.times.engine}"
        return _best_within(timed, points, self.value, dense, what, "put an exit earlier")

    def _ms(self, timed: Table, thresholds: tuple[float, ...]) -> float:
        assert self.times is not None
        return self.times.mean(tuple(timed.measure.running(thresholds)), timed.answers.route(thresholds))


@dataclass(frozen=True)
class Risk(Goal):
    """The share of new samples that exits may harm, with a confidence of 1 - delta. The fewest MACs are taken that an
    exact binomial test allows, see `certified.py`; where it allows none, nobody exits.

    Attributes:
        delta: the probability, over the samples given, that more are harmed.
        of: what counts as harm, see `Answers.harmed`.
    """

    delta: float = 0.05
    of: Harm = "disagreement"
    name = "risk"

    def check(self, model: DynamicModel) -> None:
        if not 0 < self.value < 1:
            raise CalibrationError(
                f"{self.name}={self.value}: give a share in (0, 1), 0.01 for one answer in a hundred; that none at all "
                f"is harmed, no samples can show"
            )
        if not 0 < self.delta < 1:
            raise CalibrationError(f"delta={self.delta}: give a probability in (0, 1), 0.05 for a confidence of 95%")
        if self.of not in get_args(Harm):
            raise CalibrationError(f"of={self.of!r}: choose from {', '.join(get_args(Harm))}")

    def hopeless(self, samples: int) -> str | None:
        """Why so many samples cannot show it, whatever they are, in words; None where they can."""
        needed = 2 * samples_needed(self.value, self.delta)  # one half learns the order in which thresholds are tried
        if samples >= needed:
            return None
        return (
            f"{self.name}={self.value:g} cannot be certified on {samples} held-out images, of which it takes {needed} "
            f"even if none is harmed: nobody will exit. Hold out more, ask for less, or give a budget"
        )

    def choose(self, table: Table) -> Choice:
        if self.of == "lost":
            _check_labels(table, self.name)
        if table.samples < 2:
            raise CalibrationError(f"{table.samples} samples cannot be halved, to learn from one half; give more")
        learn, judge = np.array_split(np.random.default_rng(0).permutation(table.samples), 2)
        steps = sequence(replace(table.subset(learn), harm=self.of))
        unseen = table.answers.subset(judge)
        failures = [int(unseen.harm_at(step.thresholds, self.of).sum()) for step in steps]
        last = max(1, safe_steps(failures, len(judge), self.value, self.delta)) - 1
        thresholds = steps[last].thresholds
        lost = unseen.lost(thresholds)
        drop = Drop(float(lost.mean()), float(_error(lost))) if table.answers.labelled else None
        needed = None if last else self._needed(table, steps[1:2])
        return Choice(table.point(thresholds), drop, Verdict(failures[last], len(judge), needed))

    def _needed(self, table: Table, first: Sequence[OperatingPoint]) -> int:
        """How many samples may certify the first thresholds at which anybody exits, half of them to learn from; 0 where
        none would."""
        rate = max((float(table.answers.harm_at(step.thresholds, self.of).mean()) for step in first), default=1.0)
        return 2 * samples_needed(self.value, self.delta, rate) if rate < self.value else 0


@dataclass(frozen=True)
class AccuracyDrop(Risk):
    """How far accuracy may fall below never exiting on new samples. What is tested is more: how many right answers are
    lost, whatever is gained; accuracy falls by no more."""

    of: Harm = "lost"
    name = "accuracy_drop"


def sequence(table: Table) -> list[OperatingPoint]:
    """Thresholds to be tried one after the other: nobody exits, then ever fewer MACs and, on these samples, ever more
    harm. Which exits are on, and in what proportion they let samples go, is learnt from them.

    Of those that did no more harm here than cheaper ones did, all are tried: on other samples they will do less.
    """
    never = table.point((np.inf,) * table.exits)
    return [never, *(point for point in reversed(frontier(explore(table), ties=True)) if point.macs < never.macs)]


def _check_labels(table: Table, name: str) -> None:
    if not table.answers.labelled:
        raise CalibrationError(
            f"{name} counts right answers, but the loader gave images without labels; give labels, or risk= with "
            f"of='disagreement', which needs none"
        )


def _best_within(
    table: Table, points: Sequence[OperatingPoint], share: float, dense: float, what: str, remedy: str
) -> OperatingPoint:
    """The best of the points that cost at most a share of what the bare backbone does, told what is asked for.

    Raises:
        CalibrationError: there is none.
    """
    within = [point for point in points if point.macs <= share * dense]
    if not within:
        least = min(point.macs for point in points) / dense
        raise CalibrationError(f"{what} cannot be met on these samples: the least is {least:.3f}; {remedy}")
    return _spending(table, within)


def _spending(table: Table, points: Sequence[OperatingPoint]) -> OperatingPoint:
    """Of the points as good as the best, to two standard errors of the difference, the best of those that spend nearly
    as much as the dearest.

    The best of many is lucky on these samples; new ones are better served by more compute, which the budget allows.
    """
    answers = table.answers
    best = answers.right(max(points, key=lambda p: p.accuracy).thresholds).astype(np.int64)
    equals = []
    for point in points:
        lost = best - answers.right(point.thresholds)
        if lost.mean() <= 2 * _error(lost):
            equals.append(point)
    most = max(point.macs for point in equals)
    return max((p for p in equals if p.macs >= _NEARLY * most), key=lambda p: (p.accuracy, p.macs))


def _error(lost: np.ndarray) -> np.ndarray:
    """Standard error of the mean along the last axis, of numbers that are -1, 0 or 1.

    One change more than was seen: to have seen none in few samples promises little.
    """
    return np.sqrt((lost**2).sum(-1) + 1) / lost.shape[-1]


def _expected_drop(table: Table, macs: float) -> Drop | None:
    """Of the best thresholds within mean MACs, by cross-validation; None where samples are too few."""
    samples = table.samples
    if samples < 2 * _FOLDS:
        return None
    lost = np.zeros(samples)
    order = np.random.default_rng(0).permutation(samples)
    for fold in np.array_split(order, _FOLDS):
        fitted = trade_off(table.subset(np.setdiff1d(order, fold)))
        # Points come in order of their MACs.
        point = next((p for p in reversed(fitted) if p.macs <= macs), fitted[0])
        lost[fold] = table.answers.subset(fold).lost(point.thresholds)
    return Drop(float(lost.mean()), float(_error(lost)))
