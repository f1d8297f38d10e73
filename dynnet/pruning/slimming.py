"""Network slimming: batch norm scales under an L1 penalty, so that channels show which of them the loss defends (Liu et
al., https://arxiv.org/abs/1708.06519)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def norm_scales(model: nn.Module) -> list[Tensor]:
    """The scales of all batch norms."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm.weight for norm in norms if norm.weight is not None]


@torch.no_grad()
def shrink_scales(model: nn.Module, step: float) -> None:
    """One step of the penalty, in place: scales go towards zero by so much, and stop there. The proximal form does the
    same under any optimiser."""
    for scale in norm_scales(model):
        scale -= scale.clamp(-step, step)
