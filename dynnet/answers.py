"""What every exit says of every sample: the table from which thresholds are fitted and reports are drawn.

N samples, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynnet.cost import Ledger
from dynnet.errors import DataError, NonFiniteError

if TYPE_CHECKING:
    from dynnet.model import DynamicModel


@dataclass(frozen=True)
class Answers:
    """All exits' answers to a dataset.

    Attributes:
        labels: (N,) int64.
        predictions: (N, E + 1) int64.
        confidences: (N, E + 1) float64, NaN where an exit gave NaN.
        exits: E names.
    """

    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    exits: tuple[str, ...]

    @property
    def correct(self) -> np.ndarray:
        """(N, E + 1) bool."""
        return self.predictions == self.labels[:, None]

    def route(self, thresholds: Sequence[float]) -> np.ndarray:
        """(N,) int64: the exit at which each sample leaves."""
        exits = self.confidences.shape[1] - 1
        taken = np.full(len(self.labels), exits)
        for i in reversed(range(exits)):
            # NaN compares false: never confident.
            taken[self.confidences[:, i] >= thresholds[i]] = i
        return taken

    def score(self, thresholds: Sequence[float], ledger: Ledger, remembers: bool = False) -> tuple[float, float]:
        """(accuracy in [0, 1], mean MACs) at these thresholds."""
        taken = self.route(thresholds)
        bill = ledger.bill([remembers or t < np.inf for t in thresholds]).numpy()
        return float(self.correct[np.arange(len(taken)), taken].mean()), float(bill[taken].mean())


@torch.no_grad()
def collect(model: DynamicModel, loader: Iterable[Sequence[Tensor]]) -> Answers:
    """Ask every exit about every sample.

    Args:
        model: is put into eval mode for the time.
        loader: batches of (images (B, C, H, W), labels (B,), ...).

    Raises:
        DataError: the loader is empty, or a label is no class of the model.
        NonFiniteError: the final classifier, on which everything falls back, gave NaN or infinity.
    """
    mode = model.training
    device = next(model.parameters()).device
    labels, predictions, confidences = [], [], []
    seen = 0
    try:
        model.eval()
        for batch in loader:
            images, target = batch[0].to(device), batch[1]
            if target.ndim != 1 or (
                len(target) and not 0 <= int(target.min()) <= int(target.max()) < model.num_classes
            ):
                raise DataError(
                    f"labels of samples {seen} to {seen + len(images) - 1} are no classes 0 .. {model.num_classes - 1} "
                    f"(shape {tuple(target.shape)}, from {target.min()} to {target.max()}); the model has "
                    f"{model.num_classes} classes"
                )
            logits = model.forward_exits(images).logits
            if not bool(logits[-1].isfinite().all()):
                bad = int((~logits[-1].isfinite().all(1)).sum())
                raise NonFiniteError(
                    f"the final classifier gave NaN or infinity for {bad} of samples {seen} to "
                    f"{seen + len(images) - 1}; check the weights and the normalisation of the images"
                )
            memory, said = None, []
            for at_exit in logits:
                confidence, memory = model.measure(at_exit, memory)
                said.append(confidence.double())
            labels.append(target)
            predictions.append(torch.stack([x.argmax(1) for x in logits], 1).cpu())
            confidences.append(torch.stack(said, 1).cpu())
            seen += len(images)
    finally:
        model.train(mode)
    if not seen:
        raise DataError("the loader gave no batches; give it at least one labelled image")
    return Answers(
        torch.cat(labels).numpy(),
        torch.cat(predictions).numpy(),
        torch.cat(confidences).numpy(),
        model.exits,
    )
