"""How sure an exit is: measures of confidence, and the thresholds that they are held against.

A measure turns the logits of an exit into a confidence for every sample. Who leaves is decided in `rows.py`.

    B batch, K classes, E exits
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynnet.errors import ThresholdError, did_you_mean


class Measure(ABC):
    """Turns logits into confidence, possibly remembering what earlier exits said of the same samples.

    Attributes:
        name: by which a configuration or a file names it.
        every_vote: does it need what every exit says, so that all heads run whatever the thresholds?
        least_classes: of how many classes it can tell anything.
    """

    name: str
    every_vote: bool = False
    least_classes: int = 1

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}.{cls.__qualname__}"

    @abstractmethod
    def __call__(self, logits: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            logits: (B, K) of this exit.
            memory: (B, ...) what the call at the exit before returned for these samples; None at the first exit.

        Returns:
            confidence (B,), and the memory for the next exit or None.
        """

    def running(self, thresholds: Sequence[float]) -> list[bool]:
        """Which heads run: one at inf is switched off, unless every vote counts."""
        return [self.every_vote or threshold < math.inf for threshold in thresholds]

    def rescaled(self, threshold: float, exits: int) -> float:
        """What a threshold of this measure is worth in a model of so many exits, some of which may be others."""
        return threshold


MEASURES: dict[str, Callable[[int], Measure]] = {}  # by name: from the number of exits to the measure


class Instant(Measure):
    """A measure of one exit's logits alone: `score` maps (B, K) logits to (B,)."""

    def __init__(self, score: Callable[[Tensor], Tensor], name: str, least_classes: int = 1) -> None:
        self.score, self.name, self.least_classes = score, name, least_classes

    def __call__(self, logits: Tensor, memory: Tensor | None) -> tuple[Tensor, None]:
        confidence = self.score(logits)
        if confidence.shape != logits.shape[:1]:
            raise ThresholdError(
                f"the confidence measure gave shape {tuple(confidence.shape)} for logits of shape "
                f"{tuple(logits.shape)}; it must give one number per sample, ({logits.shape[0]},)"
            )
        return confidence, None


Score = Callable[[Tensor], Tensor]


def instant(score: Score) -> Score:
    """Make a function from (B, K) logits to (B,) numbers known as a measure, by its name; it compares classes."""
    MEASURES[score.__name__] = lambda exits: Instant(score, score.__name__, least_classes=2)
    return score


@instant
def max_probability(logits: Tensor) -> Tensor:
    """(B,) the largest softmax probability, in [1/K, 1]."""
    return logits.float().softmax(1).amax(1)


@instant
def margin(logits: Tensor) -> Tensor:
    """(B,) the largest minus the second largest softmax probability, in [0, 1]."""
    top = logits.float().softmax(1).topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


@instant
def entropy(logits: Tensor) -> Tensor:
    """(B,) one minus the entropy of the softmax over its maximum log K, in [0, 1]."""
    log_p = logits.float().log_softmax(1)
    # A class of probability zero adds nothing: 0 * -inf would be NaN.
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p)
    return 1 + terms.sum(1) / math.log(logits.shape[1])


class Patience(Measure):
    """How many exits in a row have predicted the same class, as a share of all E + 1 classifiers.

    Zhou et al., "BERT Loses Patience" (https://arxiv.org/abs/2006.04152): a threshold of p / (E + 1) leaves after p
    classifiers in agreement.
    """

    name = "patience"
    every_vote = True
    least_classes = 2

    def __init__(self, exits: int) -> None:
        self.classifiers = exits + 1

    def __call__(self, logits: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        broken = logits.isnan().any(1)
        prediction = torch.where(broken, -1, logits.argmax(1))  # agrees with nobody
        streak = torch.ones_like(prediction)
        if memory is not None:
            streak = torch.where(memory[:, 0] == prediction, memory[:, 1] + 1, streak)
        # Division in float64: p / (E + 1) as a user writes it compares equal.
        confidence = streak.double() / self.classifiers
        confidence = torch.where(broken, float("nan"), confidence)
        return confidence, torch.stack([prediction, streak], 1)

    def rescaled(self, threshold: float, exits: int) -> float:
        """So many classifiers in agreement are another share of the classifiers."""
        return threshold * self.classifiers / (exits + 1)


MEASURES["patience"] = Patience


def make_measure(confidence: str | Score | Measure, exits: int) -> Measure:
    """The measure of a name, a callable (B, K) -> (B,), or itself.

    A callable is named after where it is defined: no name of `MEASURES` has a dot, so that a file which was saved with
    it is never read with another of the same name.
    """
    if isinstance(confidence, Measure):
        return confidence
    if callable(confidence):
        kind = confidence if hasattr(confidence, "__qualname__") else type(confidence)
        return Instant(confidence, f"{kind.__module__}.{kind.__qualname__}")
    if confidence in MEASURES:
        return MEASURES[confidence](exits)
    if "." in str(confidence):
        raise ThresholdError(f"{confidence!r} names a measure of somebody's own; pass the callable itself")
    raise ThresholdError(
        f"unknown confidence {confidence!r}{did_you_mean(str(confidence), MEASURES)}; choose from "
        f"{', '.join(MEASURES)}, or give a callable from (B, K) logits to (B,) numbers"
    )


def check_classes(measure: Measure, classes: int, model: str) -> None:
    """Refuse a measure that says the same of every sample, as there are too few classes.

    Raises:
        ThresholdError: with the remedy.
    """
    if classes < measure.least_classes:
        raise ThresholdError(
            f"{model} answers with one logit, and {measure.name!r} compares classes: it would be equally sure of every "
            f"sample. Give the classifier two classes; or, as for regression, a callable from (B, 1) logits to (B,) "
            f"numbers as confidence="
        )
