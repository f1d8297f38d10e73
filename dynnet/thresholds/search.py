"""Thresholds worth a look: the trade-off between accuracy and compute on a table of answers.

For a price lambda of compute, the best thresholds maximise accuracy - lambda * MACs, accuracy being the share of good
answers: right ones, or harmless ones. Given the thresholds of all other exits, the best one of an exit is found
exactly: sort the samples that reach it by confidence, add up what each gains by leaving, cut where the sum is largest.
Exits take turns until nothing changes; a sweep over lambda gives the whole trade-off. An exit that does not pay for its
head is switched off (threshold inf).

    N samples, E exits
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dynnet.thresholds.table import OperatingPoint, Table

_PRICES = np.geomspace(1e-4, 4.0, 48)  # of compute, to try; neighbours differ by a quarter
_TURNS = 8  # of all exits, at most
_PARTS = 100  # of the samples: one leaves at each step downhill; points on the hull may lie as far apart


def trade_off(table: Table) -> list[OperatingPoint]:
    """Operating points from the cheapest to the dearest, each with more accuracy than all cheaper ones."""
    return frontier(explore(table))


def frontier(points: Iterable[OperatingPoint], ties: bool = False) -> list[OperatingPoint]:
    """Those of the points that no cheaper one equals, from the cheapest on; with `ties`, that none betters."""
    kept: list[OperatingPoint] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy or (ties and point.accuracy == kept[-1].accuracy):
            kept.append(point)
    return kept


def explore(table: Table) -> list[OperatingPoint]:
    """All thresholds worth a look, good ones and dominated ones."""
    if table.exits == 0:
        return [table.point(())]
    found = {point.thresholds: point for point in _corners(table)}
    # A price finds corners of the convex hull only; between two of them, walk from the dearer one downhill.
    hull = frontier(found.values())
    walks = [(right, left.macs) for left, right in itertools.pairwise(hull)]
    # Also from where all heads run and nobody leaves, all the way: with its head paid for, the first sample that leaves
    # at an exit is a gain, where the same step from a corner at which the head is off is a loss, and ends the walk.
    above = np.nan_to_num(table.answers.confidences[:, :-1]).max(0) + 1e-9
    walks.append((table.point(above.tolist()), hull[0].macs))
    for start, floor in walks:
        if start.macs - floor > table.ledger.dense / _PARTS:
            found |= {point.thresholds: point for point in _downhill(table, start, floor)}
    tidied = {_tidied(table, thresholds) for thresholds in found}
    return [found.get(thresholds) or table.point(thresholds) for thresholds in sorted(tidied)]


def _corners(table: Table) -> Iterator[OperatingPoint]:
    """Points that are best for some price of compute, and the two ends."""
    never = (np.inf,) * table.exits
    yield table.point(never)
    yield table.point((-np.inf, *never[1:]))
    thresholds = never
    for price in _PRICES.tolist():
        for start in (thresholds, never, (0.0,) * table.exits):
            candidate = _best_thresholds(table, price, start)
            yield table.point(candidate)
            if start is thresholds:
                thresholds = candidate


def _best_thresholds(table: Table, price: float, start: Sequence[float]) -> tuple[float, ...]:
    """Exits take turns to choose their best threshold for this price of compute, until none changes."""
    thresholds = list(start)
    for _ in range(_TURNS):
        before = list(thresholds)
        for exit in reversed(range(table.exits)):
            thresholds[exit] = _best_threshold(table, price, thresholds, exit)
        if thresholds == before:
            break
    return tuple(thresholds)


def _best_threshold(table: Table, price: float, thresholds: Sequence[float], exit: int) -> float:
    """The best threshold of one exit, given those of all others."""
    answers, unit = table.answers, price / table.ledger.dense
    early = answers.route([*thresholds[:exit], *[np.inf] * (table.exits - exit)]) < exit
    gain = _gain(table, unit, thresholds, exit)
    confidence = answers.confidences[:, exit]
    rows = np.flatnonzero(~early & ~np.isnan(confidence))
    rows = rows[np.argsort(-confidence[rows], kind="stable")]
    total = np.concatenate([[0.0], np.cumsum(gain[rows])])
    # Samples of equal confidence leave together: only where it changes may be cut.
    falling = confidence[rows]
    cuts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(falling)), [len(rows)]])
    cut = int(cuts[np.argmax(total[cuts])])
    upkeep = 0.0 if table.measure.every_vote else float((~early).sum()) * table.ledger.heads[exit] * unit
    return float("inf") if cut == 0 or total[cut] <= upkeep else _below(falling, cut)


def _gain(table: Table, unit: float, thresholds: Sequence[float], exit: int) -> np.ndarray:
    """(N,) what each sample gains by leaving at an exit rather than where it would leave later."""
    answers = table.answers
    running = table.measure.running(thresholds)
    running[exit] = True
    bills = answers.bills(table.ledger, running) * unit
    later = answers.route([*[np.inf] * (exit + 1), *thresholds[exit + 1 :]])
    good, everyone = table.good.astype(np.float64), np.arange(table.samples)
    return (good[:, exit] - bills[:, exit]) - (good[everyone, later] - bills[everyone, later])


def _tidied(table: Table, thresholds: tuple[float, ...]) -> tuple[float, ...]:
    """The same thresholds; an exit that nobody takes is switched off, head and all."""
    used = np.isin(np.arange(len(thresholds)), table.answers.route(thresholds))
    return tuple(t if on else np.inf for t, on in zip(thresholds, used, strict=True))


def _below(confidences: np.ndarray, count: int) -> float:
    """A threshold that the first `count` of falling confidences reach, clear of rounding where they differ."""
    last = float(confidences[count - 1])
    lower = float(confidences[count]) if count < len(confidences) else last - 1e-3 * max(1.0, abs(last))
    return (last + lower) / 2


def _downhill(table: Table, start: OperatingPoint, floor: float) -> Iterator[OperatingPoint]:
    """Points with ever fewer MACs: each step lets the next samples go at the exit where that costs least."""
    here = start
    while here.macs > floor:
        steps = [table.point(thresholds) for thresholds in _steps(table, here.thresholds)]
        yield from steps
        steps = [step for step in steps if step.macs < here.macs]
        if not steps:
            return
        now = here
        here = max(steps, key=lambda step: (step.accuracy - now.accuracy) / (now.macs - step.macs))


def _steps(table: Table, thresholds: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
    """The same thresholds with one of them lowered, so that a hundredth of the samples leaves there besides."""
    stride = max(1, table.samples // _PARTS)
    taken = table.answers.route(thresholds)
    for exit in range(len(thresholds)):
        waiting = table.answers.confidences[taken > exit, exit]
        waiting = np.sort(waiting[~np.isnan(waiting)])[::-1]
        if len(waiting):
            yield (*thresholds[:exit], _below(waiting, min(stride, len(waiting))), *thresholds[exit + 1 :])
