"""Training of a few nested widths, which share their weights: each has to answer well by itself.

The sandwich rule (Yu & Huang, "Universally Slimmable Networks", https://arxiv.org/abs/1903.05134): every step trains
the widest and the narrowest, which learns from the widest, and between them what the routers choose.

    B batch, K classes
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynnet import DynamicModel
from dynnet.gates.routers import Routers
from dynnet.learning.losses import LossConfig, distillation, exit_losses, joint_loss
from dynnet.outputs import ExitOutputs


class Widths(NamedTuple):
    """What one batch gets: as routers choose, from the widest everywhere, and from the narrowest."""

    routed: ExitOutputs
    widest: ExitOutputs
    narrowest: ExitOutputs


class Sandwich(nn.Module):
    """A model with routers, in three forwards: one call, so that processes average gradients once.

    Args:
        model: in train mode when it is called.
    """

    def __init__(self, model: DynamicModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, equilibrium: bool, gated: bool) -> Widths:
        """(B, C, H, W) images; `equilibrium` as for the model."""
        gates = self.model.gates
        assert isinstance(gates, Routers)
        found = []
        last = len(gates.plan.regions[0].widths) - 1
        for width in (last, 0):
            gates.choose([width] * len(gates.plan.regions))
            found.append(self.model.forward_exits(images, equilibrium))
            gates.thaw()
        return Widths(self.model.forward_exits(images, equilibrium, gated), *found)


def widths_loss(said: Widths, routed: Tensor, target: Tensor, config: LossConfig, weights: tuple[float, ...]) -> Tensor:
    """The mean loss of the three.

    Args:
        said: by them.
        routed: the loss of the first, a scalar.
        target: (B,) classes or (B, K) probabilities.
        config, weights: of the exits.
    """
    widest = joint_loss(exit_losses(said.widest.logits, target, config), weights)
    teacher = said.widest.logits[-1].detach().float()
    taught = [distillation(logits, teacher, config.temperature) for logits in said.narrowest.logits]
    return (routed + widest + joint_loss(torch.stack(taught), weights)) / 3
