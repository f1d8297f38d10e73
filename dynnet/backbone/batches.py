"""Batches as loaders give them, and what criteria that look at data are shown.

B samples of a batch, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynnet.backbone.modes import device_of
from dynnet.errors import DataError

Loss = Callable[[Tensor, Tensor], Tensor]
Loader = Iterable[Sequence[Tensor]]


def taken_apart(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    """The images of a batch, and its labels; None where it has none.

    Args:
        batch: images, or (images, labels, ...).
        number: of the batch, for messages.

    Raises:
        DataError: a dictionary.
    """
    if isinstance(batch, Mapping):
        raise DataError(f"batch {number} is a dictionary with {list(batch)}; give (images, labels)")
    return (batch, None) if isinstance(batch, Tensor) else (batch[0], (*batch[1:], None)[0])


@dataclass
class Batches:
    """The first batches of a loader.

    Attributes:
        loader: batches of (images (B, C, H, W), labels (B,), ...); None for none.
        count: how many of them, at most.
        loss: of logits (B, K) and labels (B,), a mean over the batch.
        seed: of what is random.
    """

    loader: Loader | None = None
    count: int = 10
    loss: Loss = F.cross_entropy
    seed: int = 0

    def on(self, model: nn.Module, labelled: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images, labels) on the model's device.

        Raises:
            DataError: no loader, an empty one, an empty batch, one without labels where they are needed, a count below
                1, or inference mode, in which there are no gradients.
        """
        if self.loader is None:
            raise DataError(f"this criterion looks at {'labelled ' * labelled}images; give a loader of them")
        if self.count < 1:
            raise DataError(f"batches={self.count}: give a number of 1 or more")
        if labelled and torch.is_inference_mode_enabled():
            raise DataError("gradients are needed, and torch.inference_mode() has none; leave it")
        device = device_of(model)
        number = -1
        for number, batch in enumerate(islice(self.loader, self.count)):
            images, labels = taken_apart(batch, number)
            if not len(images):
                raise DataError(f"batch {number} has no images; give at least one")
            if labelled:
                labels = _checked(labels, number).to(device)
            yield images.to(device), labels if labelled else None
        if number < 0:
            raise DataError("the loader gave no batches; give it at least one image")

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch.

        Raises:
            DataError: labels that it cannot be taken of.
        """
        try:
            return self.loss(logits, labels)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise DataError(
                f"no loss of logits {tuple(logits.shape)} and labels {tuple(labels.shape)} of {labels.dtype}, from "
                f"{labels.min().item():g} to {labels.max().item():g} ({error}); give (B,) int64 class numbers below "
                f"K, or loss="
            ) from error


def _checked(labels: object, number: int) -> Tensor:
    if not isinstance(labels, Tensor) or not labels.numel():
        raise DataError(f"batch {number} has no labels, which gradients need; give (images, labels)")
    if not labels.is_floating_point() and int(labels.min()) < 0:
        raise DataError(f"batch {number} has images without a label (label {int(labels.min())}); gradients need them")
    return labels
