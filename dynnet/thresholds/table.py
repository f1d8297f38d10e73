"""The table on which thresholds are chosen: what every exit says of every sample, what it costs, and who pays for
heads.

N samples, E exits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dynnet.certificate import Harm
from dynnet.cost.ledger import Ledger
from dynnet.exits.confidence import Measure
from dynnet.thresholds.answers import Answers


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds, and what they give on the data they were fitted on.

    Attributes:
        thresholds: one for each exit.
        accuracy: share of the samples whose answer is good, see `Table.good`.
        macs: mean per sample.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    macs: float


@dataclass(frozen=True)
class Table:
    """Answers to held-out data, with their prices.

    Attributes:
        answers: of all exits.
        ledger: the prices.
        measure: of confidence, which tells what heads run at given thresholds.
        harm: what makes an answer a bad one; None where it has to be right.
    """

    answers: Answers
    ledger: Ledger
    measure: Measure
    harm: Harm | None = None

    @cached_property
    def good(self) -> np.ndarray:
        """(N, E + 1) bool: is the answer of each exit a good one?"""
        return self.answers.correct if self.harm is None else ~self.answers.harmed(self.harm)

    @property
    def samples(self) -> int:
        """N."""
        return len(self.answers.labels)

    @property
    def exits(self) -> int:
        """E."""
        return len(self.answers.exits)

    def subset(self, rows: np.ndarray) -> Table:
        """The same for some of the samples: rows (M,) int64."""
        return replace(self, answers=self.answers.subset(rows))

    def point(self, thresholds: Sequence[float]) -> OperatingPoint:
        """What these thresholds give."""
        taken = self.answers.route(thresholds)
        bills = self.answers.bills(self.ledger, self.measure.running(thresholds))
        every = np.arange(self.samples)
        accuracy, macs = self.good[every, taken].mean(), bills[every, taken].mean()
        return OperatingPoint(tuple(thresholds), float(accuracy), float(macs))
