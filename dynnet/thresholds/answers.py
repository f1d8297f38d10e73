"""What every exit says of every sample: from it thresholds are fitted and reports are drawn.

N samples, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from dynnet.backbone.batches import taken_apart
from dynnet.backbone.modes import device_of, evaluating
from dynnet.certificate import Harm
from dynnet.cost.ledger import Ledger
from dynnet.errors import DataError, NonFiniteError
from dynnet.exits.rows import route
from dynnet.model import DynamicModel


@dataclass(frozen=True)
class Answers:
    """All exits' answers to a dataset.

    Attributes:
        labels: (N,) int64; -1 where there are none.
        predictions: (N, E + 1) int64.
        confidences: (N, E + 1) float64, NaN where an exit gave NaN.
        exits: E names.
        input_size: (C, H, W) of the images, on which prices depend.
        gated: (N, E + 1) int64, what gates add to the bill of a sample that leaves at each exit; None without gates.
        masks: for each region (N, U) bool, the units that its gates leave open; empty without gates.
    """

    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    exits: tuple[str, ...]
    input_size: tuple[int, ...]
    gated: np.ndarray | None = None
    masks: tuple[np.ndarray, ...] = ()

    @property
    def labelled(self) -> bool:
        """Has every sample a label?"""
        return bool((self.labels >= 0).all())

    @cached_property
    def correct(self) -> np.ndarray:
        """(N, E + 1) bool."""
        return self.predictions == self.labels[:, None]

    def harmed(self, of: Harm) -> np.ndarray:
        """(N, E + 1) bool: would a sample be harmed by the answer of each exit?

        Args:
            of: "disagreement": it differs from the last one's; "lost": it is wrong where the last one's is right.
        """
        if of == "disagreement":
            return self.predictions != self.predictions[:, -1:]
        return self.correct[:, -1:] & ~self.correct

    def route(self, thresholds: Sequence[float]) -> np.ndarray:
        """(N,) int64: the exit at which each sample leaves."""
        return route(self.confidences, thresholds)

    def right(self, thresholds: Sequence[float]) -> np.ndarray:
        """(N,) bool: is the exit right at which each sample leaves?"""
        return self.correct[np.arange(len(self.labels)), self.route(thresholds)]

    def lost(self, thresholds: Sequence[float]) -> np.ndarray:
        """(N,) int64: 1 where the last exit is right and the one taken is wrong, -1 the other way round, else 0."""
        return self.correct[:, -1].astype(np.int64) - self.right(thresholds)

    def harm_at(self, thresholds: Sequence[float], of: Harm) -> np.ndarray:
        """(N,) bool: is each sample harmed by the answer of the exit at which it leaves?"""
        return self.harmed(of)[np.arange(len(self.labels)), self.route(thresholds)]

    def subset(self, rows: np.ndarray) -> Answers:
        """The answers to some of the samples: rows (M,) int64."""
        return replace(
            self,
            labels=self.labels[rows],
            predictions=self.predictions[rows],
            confidences=self.confidences[rows],
            gated=None if self.gated is None else self.gated[rows],
            masks=tuple(mask[rows] for mask in self.masks),
        )

    def bills(self, ledger: Ledger, running: Sequence[bool]) -> np.ndarray:
        """(N, E + 1) int64: MACs of every sample, were it to leave at each exit, where the heads `running` run."""
        bill = np.broadcast_to(ledger.bill(running).numpy(), self.confidences.shape)
        return bill if self.gated is None else bill + self.gated


@dataclass(frozen=True)
class BatchAnswers:
    """The same for one batch, as tensors on the CPU, with the size of its images."""

    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    input_size: tuple[int, ...]
    gated: Tensor | None
    masks: tuple[Tensor, ...]


@torch.no_grad()
def ask(model: DynamicModel, images: Tensor, labels: Tensor | None, seen: int = 0) -> BatchAnswers:
    """Ask every exit about every sample of a batch.

    Args:
        model: in eval mode.
        images: (B, C, H, W), on the model's device.
        labels: (B,) int64, on any device; None where nobody knows them.
        seen: samples before this batch, for messages.

    Raises:
        DataError: a label is no class of the model.
        NonFiniteError: the final classifier, on which everything falls back, gave NaN or infinity, or a gate network
            gave NaN.
    """
    which = f"samples {seen} to {seen + len(images) - 1}"
    known = labels is not None
    labels = torch.full((len(images),), -1) if labels is None else labels.cpu()
    low = 0 if known else -1
    if labels.ndim == 1 and len(labels) != len(images):
        raise DataError(f"{len(labels)} labels for the {len(images)} images of {which}; give one for each")
    if labels.ndim != 1 or (len(labels) and not low <= int(labels.min()) <= int(labels.max()) < model.num_classes):
        raise DataError(
            f"labels of {which} are no classes 0 .. {model.num_classes - 1} (shape {tuple(labels.shape)}, from "
            f"{labels.min()} to {labels.max()}); the model has {model.num_classes} classes"
        )
    outputs = model.forward_exits(images)
    logits, decisions = outputs.logits, outputs.decisions
    if not bool(logits[-1].isfinite().all()):
        bad = int((~logits[-1].isfinite().all(1)).sum())
        raise NonFiniteError(
            f"the final classifier gave NaN or infinity for {bad} of {which}; check the weights and the normalisation "
            f"of the images"
        )
    memory, said = None, []
    for at_exit in logits:
        confidence, memory = model.measure(at_exit, memory)
        said.append(confidence.double())
    predictions = torch.stack([x.argmax(1) for x in logits], 1)
    size = tuple(images.shape[1:])
    gated, masks = None, []
    if decisions is not None:
        gated = decisions.price(model.ledger(size), len(images)).cumsum(1).cpu()
        for number, taken in sorted(decisions.taken.items()):
            if bad := int(taken.logits.isnan().any(1).sum()):
                layer = decisions.gates.plan.regions[number].layer
                raise NonFiniteError(
                    f"the gate network of region {number}, at {layer}, gave NaN for {bad} of {which}; check its weights"
                )
            masks.append(taken.decisions.bool().cpu())
    return BatchAnswers(labels, predictions.cpu(), torch.stack(said, 1).cpu(), size, gated, tuple(masks))


def join(parts: Sequence[BatchAnswers], exits: tuple[str, ...]) -> Answers:
    """The answers to a whole dataset.

    Raises:
        DataError: no batches, or images of different sizes, which have different prices.
    """
    if not parts:
        raise DataError("the loader gave no batches; give it at least one labelled image")
    sizes = {part.input_size for part in parts}
    if len(sizes) > 1:
        raise DataError(f"the loader gave images of sizes {sorted(sizes)}; give all the same size, they share a price")
    return Answers(
        torch.cat([part.labels for part in parts]).numpy(),
        torch.cat([part.predictions for part in parts]).numpy(),
        torch.cat([part.confidences for part in parts]).numpy(),
        exits,
        sizes.pop(),
        None if parts[0].gated is None else torch.cat([part.gated for part in parts if part.gated is not None]).numpy(),
        tuple(torch.cat(masks).numpy() for masks in zip(*(part.masks for part in parts), strict=True)),
    )


def collect(model: DynamicModel, loader: Iterable[Tensor | Sequence[Tensor]]) -> Answers:
    """Ask every exit about every sample of a dataset.

    Args:
        model: is put into eval mode for the time.
        loader: batches of (images (B, C, H, W), labels (B,), ...), or of images alone.

    Raises:
        DataError: the loader is empty, or a label is no class of the model.
        NonFiniteError: the final classifier gave NaN or infinity.
    """
    device = device_of(model)
    parts: list[BatchAnswers] = []
    with evaluating(model):
        for batch in loader:
            images, labels = taken_apart(batch, len(parts))
            parts.append(ask(model, images.to(device), labels, sum(len(p.labels) for p in parts)))
    return join(parts, model.exits)


@torch.no_grad()
def named_right(model: nn.Module, loader: Iterable[Sequence[Tensor]]) -> np.ndarray:
    """(N,) bool: the samples of a dataset that a plain model names right.

    Args:
        model: gives logits (B, K); is put into eval mode for the time.
        loader: as for `collect`.

    Raises:
        DataError: the loader is empty.
    """
    device = device_of(model)
    with evaluating(model):
        parts = [(model(batch[0].to(device)).argmax(1).cpu() == batch[1].cpu()).numpy() for batch in loader]
    if not parts:
        raise DataError("the loader gave no batches; give it at least one labelled image")
    return np.concatenate(parts)
