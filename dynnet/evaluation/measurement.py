"""The per-input table: for every sample where it left, what it cost, and what the other exits would have said.

N samples, E exits
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dynnet.backbone.modes import device_of, evaluating
from dynnet.cost.ledger import Ledger
from dynnet.errors import DataError
from dynnet.model import DynamicModel
from dynnet.outputs import Prediction
from dynnet.thresholds.answers import Answers, BatchAnswers, ask, join
from dynnet.wrapping import wrap


@dataclass(frozen=True)
class Measurement:
    """What a dynamic model did with a dataset.

    Attributes:
        exit: (N,) int64, where each sample left.
        prediction: (N,) int64.
        confidence: (N,) at that exit.
        macs: (N,) int64, what ran for it; FLOPs are twice as many.
        answers: what every exit says of every sample, and the labels.
        ledger: the prices.
        thresholds: at which this was measured.
    """

    exit: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray
    macs: np.ndarray
    answers: Answers
    ledger: Ledger
    thresholds: tuple[float, ...]

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool."""
        return self.prediction == self.answers.labels

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def never_exiting_accuracy(self) -> float:
        return float(self.answers.correct[:, -1].mean())

    @property
    def macs_share(self) -> float:
        """Mean MACs over the bare backbone's."""
        return float(self.macs.mean() / self.ledger.dense)

    @property
    def rates(self) -> tuple[float, ...]:
        """Share of the samples that left at each exit and at the end."""
        return tuple(float((self.exit == e).mean()) for e in range(len(self.thresholds) + 1))

    def __str__(self) -> str:
        macs, dense = float(self.macs.mean()), self.ledger.dense
        names = [*self.answers.exits, "end"]
        lines = [
            f"{len(self.exit)} samples: accuracy {self.accuracy:.2%} (never exiting {self.never_exiting_accuracy:.2%})",
            f"mean {macs / 1e6:.2f} MMAC = {2 * macs / 1e6:.2f} MFLOP a sample, {self.macs_share:.1%} of the bare "
            f"backbone's {dense / 1e6:.2f} MMAC = {2 * dense / 1e6:.2f} MFLOP",
        ]
        for e, (name, rate) in enumerate(zip(names, self.rates, strict=True)):
            here = self.exit == e
            right = f"{self.correct[here].mean():.2%} right" if here.any() else "-"
            lines.append(f"  {name}: {rate:.1%} left here, {right}")
        if self.ledger.unpriced:
            lines.append(f"  not priced, so all MACs are lower bounds: {self.ledger.unpriced}")
        return "\n".join(lines)

    def table(self) -> dict[str, np.ndarray]:
        """Columns of the per-input table, each (N,)."""
        columns: dict[str, np.ndarray] = {
            "id": np.arange(len(self.exit)),
            "label": self.answers.labels,
            "prediction": self.prediction,
            "exit": self.exit,
            "confidence": self.confidence,
            "macs": self.macs,
            "flops": 2 * self.macs,
            "correct": self.correct.astype(int),
        }
        for e in range(len(self.thresholds) + 1):
            columns[f"prediction_{e}"] = self.answers.predictions[:, e]
            columns[f"confidence_{e}"] = self.answers.confidences[:, e]
            columns[f"correct_{e}"] = self.answers.correct[:, e].astype(int)
        return columns


def measure(model: nn.Module, loader: Iterable[Sequence[Tensor]]) -> Measurement:
    """Run a model over a dataset, and ask all exits besides.

    >>> import torch, dynnet
    >>> model = dynnet.create_model("digits")
    >>> loader = [(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))]
    >>> found = measure(model, loader)
    >>> found.exit.shape, found.macs.shape, found.table()["flops"].shape
    ((4,), (4,), (4,))

    Args:
        model: wrapped, with thresholds set; or a plain one, pruned or not, which is taken for one without exits. It is
            put into eval mode for the time.
        loader: batches of (images (B, C, H, W), labels (B,), ...).

    Raises:
        DataError, NonFiniteError: see `dynnet.thresholds.answers.ask` and `join`.
    """
    if not isinstance(model, DynamicModel):
        first, loader = _peeked(loader)
        model = wrap(model, [], input_size=cast(tuple[int, int, int], tuple(first.shape[1:])))
    device = device_of(model)
    said: list[BatchAnswers] = []
    parts: list[Prediction] = []
    with evaluating(model):
        for batch in loader:
            images = batch[0].to(device)
            said.append(ask(model, images, batch[1], sum(len(s.labels) for s in said)))
            parts.append(model.predict(images))
    answers = join(said, model.exits)
    logits, exit, confidence, macs = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Measurement(
        exit=exit.numpy(),
        prediction=logits.argmax(1).numpy(),
        confidence=confidence.double().numpy(),
        macs=macs.numpy(),
        answers=answers,
        ledger=model.ledger(answers.input_size),
        thresholds=model.thresholds,
    )


def _peeked(loader: Iterable[Sequence[Tensor]]) -> tuple[Tensor, Iterable[Sequence[Tensor]]]:
    """The images of the first batch, and all batches."""
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise DataError("the loader gave no batches; give it at least one labelled image")
    return first[0], itertools.chain([first], batches)
