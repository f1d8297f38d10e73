"""Gate networks: what they read, and how they decide.

At the entry of a region its network reads the mean of the features and gives every unit a logit; a unit is open where
that is not negative.

Training follows Li et al., "Dynamic Dual Gating Neural Networks" (DGNet, ICCV 2021): logistic noise on the logits and a
temperature, hard decisions forward, the gradient of the sigmoid backward (straight through).

    B rows of the batch, C channels of a layer, U units of a region
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dynnet.errors import GateError
from dynnet.gates.plan import GatePlan, Region

TEMPERATURE = 2 / 3  # of the sigmoid, as in DGNet
_OPEN = 2.0  # bias of the logits: gates begin open


class GateNetwork(nn.Module):
    """From the features at the entry of a region to one logit a unit."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.groups = len(region.groups)
        group = torch.arange(self.groups).repeat_interleave(torch.tensor(region.groups))
        self.register_buffer("group", group, persistent=False)  # (U,) the group of every unit
        self.norm = nn.LayerNorm(region.inputs)
        self.hidden = nn.Linear(region.inputs, region.hidden)
        self.logits = nn.Linear(region.hidden, region.units)
        nn.init.constant_(self.logits.bias, _OPEN)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) mean features to (B, U) logits."""
        return cast(Tensor, self.logits(self.hidden(self.norm(x)).relu()))

    def opens(self, logits: Tensor) -> Tensor:
        """(B, U) logits to bool: open where not negative, and of every group the largest. NaN is open."""
        group = cast(Tensor, self.group).expand_as(logits)
        largest = logits.new_full((logits.shape[0], self.groups), -torch.inf).scatter_reduce(1, group, logits, "amax")
        # Closed is what is certain: a comparison with NaN is false.
        return ~(logits < largest.clamp_(max=0).gather(1, group))


class Gates(nn.Module):
    """All gate networks of a model, and the plan by which their decisions switch layers.

    Attributes:
        plan: regions and sites.
        networks: one for each region.
        noise: scale of the logistic noise on the logits in train mode; fades out in the course of training.
        frozen: decisions that hold for every image, one (U,) bool tensor a region; None where networks decide.
    """

    def __init__(self, plan: GatePlan) -> None:
        super().__init__()
        self.plan = plan
        self.networks = nn.ModuleList(self.network(region) for region in plan.regions)
        self.noise = 1.0
        self.frozen: tuple[Tensor, ...] | None = None

    @staticmethod
    def network(region: Region) -> nn.Module:
        """That decides on a region."""
        return GateNetwork(region)

    def freeze(self, masks: Sequence[Tensor]) -> None:
        """Decide alike for every image from now on, until `thaw`; the gate networks do not run and cost nothing.

        It is no part of what `dynnet.save` writes.

        Args:
            masks: for each region (U,) bool, open or closed.

        Raises:
            GateError: not one mask a region, of another size or type, or a group without any open unit.
        """
        regions = self.plan.regions
        if len(masks) != len(regions):
            raise GateError(f"got {len(masks)} masks for {len(regions)} regions; give one for each")
        for number, (mask, region) in enumerate(zip(masks, regions, strict=True)):
            if mask.dtype != torch.bool or tuple(mask.shape) != (region.units,):
                raise GateError(
                    f"the mask of region {number} (at {region.layer}) is {mask.dtype} of shape {tuple(mask.shape)}; "
                    f"give torch.bool of shape ({region.units},)"
                )
            if not all(bool(part.any()) for part in mask.split(region.groups)):
                raise GateError(f"the mask of region {number} (at {region.layer}) closes a group; leave one unit open")
        self.frozen = tuple(mask.clone() for mask in masks)

    def thaw(self) -> None:
        """Let the networks decide again."""
        self.frozen = None

    def decide(self, number: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """What region `number` makes of (B, C) mean features.

        Returns:
            The logits (B, U), and the decisions (B, U): 1 open, 0 closed, with the gradient of the sigmoid in train
            mode. One unit of every group stays open, and so does a unit whose logit is NaN.
        """
        network = cast(GateNetwork, self.networks[number])
        logits = network(features).float()
        if not self.training:
            return logits, network.opens(logits).to(logits.dtype)
        noisy = logits
        if self.noise > 0:
            noisy = logits + self.noise * torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit()
        soft = (noisy / TEMPERATURE).sigmoid()
        # The brackets keep a one a one, whatever the precision.
        return logits, network.opens(noisy).to(soft.dtype) + (soft - soft.detach())
