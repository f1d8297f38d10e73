"""Thresholds from held-out data: for a budget of MACs, or for a bound on the accuracy drop.

For a price lambda of compute, the best thresholds maximise accuracy - lambda * MACs. Given the thresholds of all other
exits, the best one of an exit is found exactly: sort the samples that reach it by confidence, add up what each gains by
leaving, cut where the sum is largest. Exits take turns until nothing changes; a sweep over lambda gives the whole
trade-off. An exit that does not pay for its head is switched off (threshold inf).

The largest of many noisy sums is lucky on the samples that it was chosen on. What new samples will give is therefore
told by cross-validation: thresholds fitted on all folds but one are tried on that one.

    N samples, E exits
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dynnet.cost.ledger import Ledger
from dynnet.errors import CalibrationError
from dynnet.exits.confidence import active, to_json
from dynnet.model import DynamicModel
from dynnet.thresholds.answers import Answers, collect

# Prices of compute to try; neighbours differ by a quarter.
_PRICES = 48

_FOLDS = 5


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds, and what they give on the data they were fitted on.

    Attributes:
        thresholds: one for each exit.
        accuracy: in [0, 1].
        macs: mean per sample.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    macs: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did. Saved with the model.

    Attributes:
        goal: "budget" or "accuracy_drop".
        value: what was asked for.
        thresholds: what was found, infinite ones as "inf" and "-inf".
        samples: how many it was fitted on.
        confidence: the measure that the thresholds belong to.
        accuracy, macs: of the dynamic model on those samples; MACs are means per sample.
        drop, drop_error: how far accuracy will fall below the final classifier's on new samples, and the standard error
            of that estimate, by cross-validation; None where samples are too few.
        full_accuracy, dense_macs: of the final classifier, and of the bare backbone.
        rates: share of the samples that leaves at each exit and at the end.
    """

    goal: str
    value: float
    thresholds: tuple[float | str, ...]
    samples: int
    confidence: str
    accuracy: float
    macs: float
    drop: float | None
    drop_error: float | None
    full_accuracy: float
    dense_macs: int
    rates: tuple[float, ...]

    def __str__(self) -> str:
        rates = " / ".join(f"{rate:.0%}" for rate in self.rates)
        new = "" if self.drop is None else f", {self.drop:.2%} ± {self.drop_error:.2%} lower expected on new samples"
        return (
            f"calibrated for {self.goal}={self.value:g} on {self.samples} samples: accuracy {self.accuracy:.2%} "
            f"(never exiting {self.full_accuracy:.2%}{new}) at {self.macs / self.dense_macs:.1%} of the MACs "
            f"({self.macs / 1e6:.2f} of {self.dense_macs / 1e6:.2f} MMAC, {2 * self.macs / 1e6:.2f} MFLOP); "
            f"exits taken {rates}"
        )


def calibrate(
    model: DynamicModel,
    loader: Iterable[Sequence[Tensor]],
    *,
    budget: float | None = None,
    accuracy_drop: float | None = None,
) -> Calibration:
    """Fit `model.thresholds` on held-out data. Never use the test split.

    Args:
        model: gets the thresholds, and a record of what they were fitted on.
        loader: batches of (images, labels, ...) that were not trained on.
        budget: mean MACs per sample, as a share of the bare backbone's. The best accuracy within it is taken; where the
            samples cannot tell the difference, within two standard errors, the thresholds that spend more.
        accuracy_drop: how far accuracy may fall below never exiting on new samples, 0.005 for half a point. The fewest
            MACs are taken at which the drop, as cross-validation sees it, plus its standard error stays within: few
            samples cannot promise much.

    Raises:
        CalibrationError: not exactly one goal, or one that cannot be reached.
        DataError, NonFiniteError: the loader or the model's answers are no basis; thresholds are left as they were.
    """
    if (budget is None) == (accuracy_drop is None):
        raise CalibrationError(f"got budget={budget} and accuracy_drop={accuracy_drop}; give exactly one of them")
    if not model.exits:
        raise CalibrationError("the model has no exits, there are no thresholds to fit")
    if accuracy_drop is not None and not 0 <= accuracy_drop < 1:
        raise CalibrationError(f"accuracy_drop={accuracy_drop}: give a share in [0, 1), 0.005 for half a point")
    if budget is not None:
        check_budget(model, budget)
    answers = collect(model, loader)
    ledger = model.ledger(answers.input_size)
    explored = _explore(answers, ledger, model.remembers)
    if budget is not None:
        within = [p for p in explored if p.macs <= budget * ledger.dense]
        if not within:
            least = min(p.macs for p in explored) / ledger.dense
            raise CalibrationError(
                f"a budget of {budget} of the dense MACs cannot be met on these samples: the least is {least:.3f}; are "
                f"exits giving NaN?"
            )
        best = _spending(answers, within)
        drop = next(iter(_expected_drops(answers, ledger, model.remembers, [best.macs])), None)
        goal, value = "budget", budget
    else:
        assert accuracy_drop is not None
        best, drop = _within_drop(answers, ledger, model.remembers, _frontier(explored), accuracy_drop)
        goal, value = "accuracy_drop", accuracy_drop
    model.thresholds = best.thresholds
    taken = answers.route(best.thresholds)
    calibration = Calibration(
        goal=goal,
        value=value,
        thresholds=tuple(to_json(t) for t in best.thresholds),
        samples=len(answers.labels),
        confidence=model.config.confidence,
        accuracy=best.accuracy,
        macs=best.macs,
        drop=drop.mean if drop else None,
        drop_error=drop.error if drop else None,
        full_accuracy=float(answers.correct[:, -1].mean()),
        dense_macs=ledger.dense,
        rates=tuple(float((taken == e).mean()) for e in range(len(model.exits) + 1)),
    )
    model.calibration = asdict(calibration)
    return calibration


def check_budget(model: DynamicModel, budget: float) -> None:
    """Refuse a budget that not even the cheapest sample can meet.

    Raises:
        CalibrationError: it is below that, or no number; the message gives the floor.
    """
    dense, floor = model.ledger().dense, model.floor()
    if not budget * dense >= floor:
        what = [f"leaving at the first exit {model.exits[0]!r}"] if model.exits else []
        what += ["what gates cannot switch, and the gates themselves"] if model.gates is not None else []
        raise CalibrationError(
            f"a budget of {budget} of the dense MACs cannot be met: {', with '.join(what)} costs {floor / dense:.3f} "
            f"already; give at least that{', or put an exit earlier' if model.exits else ''}"
        )


def trade_off(answers: Answers, ledger: Ledger, remembers: bool = False) -> list[OperatingPoint]:
    """Operating points from the cheapest to the dearest, each with more accuracy than all cheaper ones.

    Args:
        answers: of all exits, on held-out data.
        ledger: the prices.
        remembers: all heads run whatever the thresholds (patience).
    """
    return _frontier(_explore(answers, ledger, remembers))


def _spending(answers: Answers, points: Sequence[OperatingPoint]) -> OperatingPoint:
    """Of the points as good as the best, to two standard errors of the difference, the dearest.

    The best of many is lucky on these samples; new ones are better served by more compute, which the budget allows.
    """
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


class _Drop(NamedTuple):
    """How far accuracy falls below never exiting on new samples, and the standard error of that estimate."""

    mean: float
    error: float


def _within_drop(
    answers: Answers, ledger: Ledger, remembers: bool, points: Sequence[OperatingPoint], bound: float
) -> tuple[OperatingPoint, _Drop]:
    """The cheapest of the points whose expected drop plus its standard error stays within the bound.

    From the dearest on, as long as all is well: a cheap one that looks well by luck is not reached.
    """
    best = _point(answers, ledger, (np.inf,) * len(answers.exits), remembers)
    promised = _Drop(0.0, 0.0)
    drops = _expected_drops(answers, ledger, remembers, [p.macs for p in points])
    if not drops:
        raise CalibrationError(
            f"{len(answers.labels)} samples are too few to bound an accuracy drop; give at least {2 * _FOLDS}"
        )
    for point, drop in zip(reversed(points), reversed(drops), strict=True):
        if drop.mean + drop.error > bound:
            break
        if point.macs < best.macs:
            best, promised = point, drop
    return best, promised


def _expected_drops(answers: Answers, ledger: Ledger, remembers: bool, levels: Sequence[float]) -> list[_Drop]:
    """For each level of mean MACs, by cross-validation; empty where samples are too few."""
    samples = len(answers.labels)
    if samples < 2 * _FOLDS:
        return []
    lost = np.zeros((len(levels), samples))
    order = np.random.default_rng(0).permutation(samples)
    for fold in np.array_split(order, _FOLDS):
        fitted = trade_off(answers.subset(np.setdiff1d(order, fold)), ledger, remembers)
        unseen = answers.subset(fold)
        for k, level in enumerate(levels):
            # Points come in order of their MACs.
            point = next((p for p in reversed(fitted) if p.macs <= level), fitted[0])
            lost[k, fold] = unseen.lost(point.thresholds)
    return [_Drop(float(mean), float(error)) for mean, error in zip(lost.mean(1), _error(lost), strict=True)]


def _explore(answers: Answers, ledger: Ledger, remembers: bool) -> list[OperatingPoint]:
    """All thresholds worth a look, good ones and dominated ones."""
    exits = len(answers.exits)
    if exits == 0:
        return [_point(answers, ledger, (), remembers)]
    never, always = (np.inf,) * exits, (-np.inf, *(np.inf,) * (exits - 1))
    found = {never: _point(answers, ledger, never, remembers), always: _point(answers, ledger, always, remembers)}
    thresholds = never
    for price in np.geomspace(1e-4, 4.0, _PRICES):
        for start in (thresholds, never, (0.0,) * exits):
            candidate = _best_thresholds(answers, ledger, float(price), start, remembers)
            found[candidate] = _point(answers, ledger, candidate, remembers)
            if start is thresholds:
                thresholds = candidate
    # A price finds corners of the convex hull only; between two of them, walk from the dearer one downhill.
    hull = _frontier(found.values())
    # Also from where all heads run and nobody leaves, for what lies above the corner of the best accuracy: with its
    # head paid for, the first sample that leaves at an exit is a gain.
    above = np.nan_to_num(answers.confidences[:, :-1]).max(0) + 1e-9
    hull.append(_point(answers, ledger, tuple(above.tolist()), remembers))
    for left, right in itertools.pairwise(hull):
        if right.macs - left.macs > 0.01 * ledger.dense:
            for point in _downhill(answers, ledger, right, left.macs, remembers):
                found[point.thresholds] = point
    tidied = {_tidied(answers, point.thresholds) for point in found.values()}
    return [found.get(thresholds) or _point(answers, ledger, thresholds, remembers) for thresholds in sorted(tidied)]


def _best_thresholds(
    answers: Answers, ledger: Ledger, price: float, start: Sequence[float], remembers: bool
) -> tuple[float, ...]:
    """Exits take turns to choose their best threshold for this price of compute, until none changes."""
    thresholds = list(start)
    exits, samples = len(thresholds), len(answers.labels)
    everyone = np.arange(samples)
    unit = price / ledger.dense
    correct = answers.correct.astype(np.float64)
    for _ in range(8):
        before = list(thresholds)
        for i in reversed(range(exits)):
            running = active(thresholds, remembers)
            running[i] = True
            bills = answers.bills(ledger, running) * unit
            earlier = answers.route([*thresholds[:i], *[np.inf] * (exits - i)]) < i
            later = answers.route([*[np.inf] * (i + 1), *thresholds[i + 1 :]])
            gain = (correct[:, i] - bills[:, i]) - (correct[everyone, later] - bills[everyone, later])
            confidence = answers.confidences[:, i]
            rows = np.flatnonzero(~earlier & ~np.isnan(confidence))
            rows = rows[np.argsort(-confidence[rows], kind="stable")]
            total = np.concatenate([[0.0], np.cumsum(gain[rows])])
            # Samples of equal confidence leave together: only where it changes may be cut.
            sorted_confidence = confidence[rows]
            cuts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(sorted_confidence)), [len(rows)]])
            cut = int(cuts[np.argmax(total[cuts])])
            upkeep = 0.0 if remembers else float((~earlier).sum()) * ledger.heads[i] * unit
            thresholds[i] = np.inf if cut == 0 or total[cut] <= upkeep else _below(sorted_confidence, cut)
        if thresholds == before:
            break
    return tuple(thresholds)


def _tidied(answers: Answers, thresholds: tuple[float, ...]) -> tuple[float, ...]:
    """The same thresholds; an exit that nobody takes is switched off, head and all."""
    used = np.isin(np.arange(len(thresholds)), answers.route(thresholds))
    return tuple(t if on else np.inf for t, on in zip(thresholds, used, strict=True))


def _below(confidences: np.ndarray, count: int) -> float:
    """A threshold that the first `count` of falling confidences reach, clear of rounding where they differ."""
    last = float(confidences[count - 1])
    lower = float(confidences[count]) if count < len(confidences) else last - 1e-3 * max(1.0, abs(last))
    return (last + lower) / 2


def _point(answers: Answers, ledger: Ledger, thresholds: tuple[float, ...], remembers: bool) -> OperatingPoint:
    return OperatingPoint(thresholds, *answers.score(thresholds, ledger, remembers))


def _frontier(points: Iterable[OperatingPoint]) -> list[OperatingPoint]:
    kept: list[OperatingPoint] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept


def _downhill(
    answers: Answers, ledger: Ledger, start: OperatingPoint, floor: float, remembers: bool
) -> Iterable[OperatingPoint]:
    """Points with ever fewer MACs: each step lets the next 1% of the samples go at the exit where that costs least."""
    here = start
    stride = max(1, len(answers.labels) // 100)
    while here.macs > floor:
        steps = []
        taken = answers.route(here.thresholds)
        for i in range(len(here.thresholds)):
            waiting = answers.confidences[taken > i, i]
            waiting = np.sort(waiting[~np.isnan(waiting)])[::-1]
            if len(waiting):
                lower = _below(waiting, min(stride, len(waiting)))
                thresholds = (*here.thresholds[:i], lower, *here.thresholds[i + 1 :])
                steps.append(_point(answers, ledger, thresholds, remembers))
        yield from steps
        steps = [step for step in steps if step.macs < here.macs]
        if not steps:
            return
        now = here
        here = max(steps, key=lambda step: (step.accuracy - now.accuracy) / (now.macs - step.macs))
