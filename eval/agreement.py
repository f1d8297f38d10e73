"""Does an exported model answer as the eager one does? Asked image by image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynnet import DynamicModel
from dynnet.backbone.modes import device_of
from dynnet.deploy import Runner
from dynnet.thresholds.answers import ask

NEAR = 1e-5  # of a threshold: who is nearer may be rounded to the other side


@dataclass(frozen=True)
class Agreement:
    """Of an exported model with the eager one, at the same thresholds.

    Attributes:
        images: how many were asked.
        near: of them, those whose confidence is within NEAR of a threshold that they met.
        other_exit: of the others, those that left elsewhere,
        other_class: or got another class.
        near_other: of those near a threshold, those that left elsewhere or got another class.
        logits: the largest difference, of images that left at the same exit.
    """

    images: int
    near: int
    other_exit: int
    other_class: int
    near_other: int
    logits: float

    @property
    def whole(self) -> bool:
        """The same exit and class for every image that is not near a threshold?"""
        return self.other_exit == self.other_class == 0

    def summary(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        told = "the same exit and class for all of them"
        if not self.whole:
            told = f"{self.other_exit} left elsewhere, {self.other_class} got another class"
        return (
            f"{self.images} images as the eager model answers them: {self.images - self.near} not within {NEAR:g} of a "
            f"threshold{f', {told}' if self.images > self.near else ''}; {self.near} within, of which "
            f"{self.near_other} left elsewhere or got another class; logits differ by {self.logits:.2g} at most"
        )


@torch.no_grad()
def agreement(model: DynamicModel, runner: Runner, batches: Iterable[Tensor]) -> Agreement:
    """Ask both.

    Args:
        model: in eval mode.
        runner: of the same model, at the same thresholds.
        batches: of images (B, C, H, W).
    """
    thresholds = np.array(model.thresholds)
    running = np.array(model.running, dtype=bool)
    counts = np.zeros(5, dtype=np.int64)
    worst = 0.0
    for images in batches:
        given = images.to(device_of(model))
        theirs, ours = model.predict(given), runner.predict(images.numpy())
        exit, logits = theirs.exit.cpu().numpy(), theirs.logits.cpu().numpy()
        # Confidences at the exits that an image met, whether it left there or not.
        confidences = ask(model, given, None).confidences.numpy()[:, : len(thresholds)]
        met = running & (np.arange(len(thresholds)) <= exit[:, None])
        near = (met & (np.abs(confidences - thresholds) <= NEAR)).any(1)
        elsewhere, otherwise = ours.exit != exit, ours.logits.argmax(1) != logits.argmax(1)
        counts += [
            len(images), near.sum(), (elsewhere & ~near).sum(), (otherwise & ~near).sum(),
            ((elsewhere | otherwise) & near).sum(),
        ]  # fmt: skip
        if not elsewhere.all():
            worst = max(worst, float(np.abs(ours.logits - logits)[~elsewhere].max()))
    images_, near_, exit_, class_, near_other = counts.tolist()
    return Agreement(images_, near_, exit_, class_, near_other, worst)
