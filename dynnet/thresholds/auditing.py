"""Answers of early exits held against the full model's, for a watch over a certified risk."""

from __future__ import annotations

import torch
from torch import Tensor

from dynnet.model import DynamicModel
from dynnet.outputs import Prediction


def audited(
    model: DynamicModel, images: Tensor, prediction: Prediction, share: float, generator: torch.Generator
) -> list[bool]:
    """Audit some answers: those of early exits are compared with the full model's. B batch.

    >>> import timm, dynnet
    >>> from dynnet.thresholds.watch import Watch
    >>> model = dynnet.wrap(timm.create_model("cifar_resnet20"), exits=["layer1"]).eval()
    >>> model.thresholds, watch = [0.0], Watch(risk=0.01)
    >>> images = torch.randn(8, 3, 32, 32)
    >>> disagree = audited(model, images, model.predict(images), 1.0, torch.Generator().manual_seed(0))
    >>> alarm = watch.see(disagree)

    Args:
        model: in eval mode.
        images: (B, C, H, W).
        prediction: what `model.predict` gave for them.
        share: of the answers, each drawn by itself; what the audit costs is this share of the full model, for those
            that left early.
        generator: of the draws.

    Returns:
        For each answer that was drawn: does the full model disagree?
    """
    drawn = torch.rand(len(images), generator=generator) < share
    early = drawn & (prediction.exit.cpu() < len(model.exits))
    disagree = torch.zeros(len(images), dtype=torch.bool)
    if early.any():
        rows = early.to(images.device)
        with torch.no_grad():
            full = model.forward_exits(images[rows]).logits[-1].argmax(1)
        disagree[early] = (full != prediction.logits[rows].argmax(1)).cpu()
    return disagree[drawn].tolist()
