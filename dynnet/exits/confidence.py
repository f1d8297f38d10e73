"""When a sample answers early. B batch, K classes, E exits.

A measure turns the logits of an exit into a confidence for every sample. A sample leaves where its own confidence
reaches the threshold of the exit; what its neighbours do has no say in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dynnet.errors import ThresholdError, did_you_mean


class Measure(Protocol):
    """Turns logits into confidence, possibly remembering what earlier exits said of the same samples."""

    def __call__(self, logits: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            logits: (B, K) of this exit.
            memory: (B, ...) what the call at the exit before returned for these samples; None at the first exit.

        Returns:
            confidence (B,), and the memory for the next exit or None.
        """
        ...


class Instant:
    """A measure of one exit's logits alone: `score` maps (B, K) logits to (B,)."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score

    def __call__(self, logits: Tensor, memory: Tensor | None) -> tuple[Tensor, None]:
        confidence = self.score(logits)
        if confidence.shape != logits.shape[:1]:
            raise ThresholdError(
                f"the confidence measure gave shape {tuple(confidence.shape)} for logits of shape "
                f"{tuple(logits.shape)}; it must give one number per sample, ({logits.shape[0]},)"
            )
        return confidence, None


class Patience:
    """How many exits in a row have predicted the same class, as a share of all E + 1 classifiers.

    Zhou et al., "BERT Loses Patience" (https://arxiv.org/abs/2006.04152): a threshold of p / (E + 1) leaves after p
    classifiers in agreement.
    """

    def __init__(self, classifiers: int) -> None:
        self.classifiers = classifiers

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


def max_probability(logits: Tensor) -> Tensor:
    """(B,) the largest softmax probability, in [1/K, 1]."""
    return logits.float().softmax(1).amax(1)


def margin(logits: Tensor) -> Tensor:
    """(B,) the largest minus the second largest softmax probability, in [0, 1]."""
    top = logits.float().softmax(1).topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def entropy(logits: Tensor) -> Tensor:
    """(B,) one minus the entropy of the softmax over its maximum log K, in [0, 1]."""
    log_p = logits.float().log_softmax(1)
    # A class of probability zero adds nothing: 0 * -inf would be NaN.
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p)
    return 1 + terms.sum(1) / math.log(logits.shape[1])


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}


def make_measure(confidence: str | Callable[[Tensor], Tensor], exits: int) -> Measure:
    """The measure of a name ("max_probability", "margin", "entropy", "patience"), or of a callable (B, K) -> (B,)."""
    if callable(confidence):
        return Instant(confidence)
    if confidence == "patience":
        return Patience(exits + 1)
    if confidence in MEASURES:
        return Instant(MEASURES[confidence])
    known = [*MEASURES, "patience"]
    raise ThresholdError(
        f"unknown confidence {confidence!r}{did_you_mean(str(confidence), known)}; choose from {', '.join(known)}, or "
        f"give a callable from (B, K) logits to (B,) numbers"
    )


def leaves(confidence: Tensor, threshold: float) -> Tensor:
    """Which samples answer at this exit.

    Args:
        confidence: (B,); NaN never leaves.
        threshold: leave where confidence >= threshold; inf never, -inf always.

    Returns:
        (B,) bool.
    """
    # NaN >= -inf is False in IEEE 754, so a broken head can never answer.
    # In float64, where thresholds were fitted: in float32 one just above the largest confidence would be rounded to it.
    return confidence.double() >= threshold


def active(thresholds: Sequence[float], remembers: bool) -> list[bool]:
    """Which heads run: one at inf is switched off, unless the measure remembers every exit's vote (patience)."""
    return [remembers or threshold < math.inf for threshold in thresholds]


def to_json(threshold: float) -> float | str:
    """A threshold for JSON, which has no infinity: inf and -inf become strings that float() reads back."""
    return threshold if abs(threshold) < math.inf else str(threshold)


def check_thresholds(thresholds: Sequence[float], exits: Sequence[str]) -> tuple[float, ...]:
    """The thresholds as a tuple of floats.

    Raises:
        ThresholdError: not one number for each exit.
    """
    try:
        values = tuple(float(t) for t in thresholds)
    except (TypeError, ValueError):
        raise ThresholdError(
            f"thresholds={thresholds!r}: give a sequence of numbers, one for each of {list(exits)}"
        ) from None
    if len(values) != len(exits):
        raise ThresholdError(
            f"got {len(values)} thresholds for {len(exits)} exits {list(exits)}; "
            f"give one per exit, float('inf') where none should leave"
        )
    for value, name in zip(values, exits, strict=True):
        if math.isnan(value):
            raise ThresholdError(f"the threshold of exit {name!r} is NaN; give a number, inf or -inf")
    return values
