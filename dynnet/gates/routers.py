"""Routers: at an exit, how wide a sample goes on; and what batch norms remember of each width.

A router reads the mean of the exit's features and gives every width a logit; the largest wins. It learns by the
Gumbel-softmax estimator (Jang et al., https://arxiv.org/abs/1611.01144), straight through: hard choices forward, the
gradient of the softmax backward.

    B samples, C channels, K widths, U units of a region
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynnet.backbone.layers.kind import replace_
from dynnet.backbone.names import is_inside
from dynnet.backbone.subsets import Subset
from dynnet.errors import GateError
from dynnet.gates.networks import Gates
from dynnet.gates.plan import GatePlan, Region, Side

TEMPERATURE = 1.0  # of the softmax


class Router(nn.Module):
    """From features of an exit to one logit a width.

    Attributes:
        lean: (K,) what is added to the logits: how far widths are preferred for what they cost.
    """

    masks: Tensor
    lean: Tensor

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.register_buffer("masks", region.masks.float(), persistent=False)  # (K, U)
        self.register_buffer("lean", torch.zeros(len(region.widths)))
        self.norm = nn.LayerNorm(region.inputs)
        self.hidden = nn.Linear(region.inputs, region.hidden)
        self.logits = nn.Linear(region.hidden, len(region.widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) mean features to (B, K) logits."""
        return cast(Tensor, self.logits(self.hidden(self.norm(x)).relu()) + self.lean)


class WidthNorm(nn.Module):
    """What a batch norm remembers of all widths but the last, of which it remembers itself: (K - 1, C) each."""

    mean: Tensor
    var: Tensor

    def __init__(self, norm: nn.Module, widths: int) -> None:
        super().__init__()
        for name in ("mean", "var"):
            known = cast(Tensor, getattr(norm, f"running_{name}")).detach()
            self.register_buffer(name, known.expand(widths - 1, -1).clone())


class Routers(Gates):
    """All routers of a model, and the plan by which they choose.

    Attributes:
        norms: one for each of the plan's batch norms.
        chosen: for each region the width that all samples have; None where routers choose.
        drawn: (R, K) how often each width is drawn at random, whatever routers say; None where they choose.
        copies: for each container a narrow copy for each width, to be run in its place; none where the container runs
            on slices of its weights.
    """

    def __init__(self, plan: GatePlan, backbone: nn.Module) -> None:
        super().__init__(plan)
        widths = len(plan.regions[0].widths)
        self.norms = nn.ModuleList(WidthNorm(backbone.get_submodule(name), widths) for name in plan.norms)
        self.number = {name: number for number, name in enumerate(plan.norms)}
        self.place = {container.name: place for place, container in enumerate(plan.containers)}
        self._subsets: dict[tuple[Side, int, torch.device], Subset | None] = {}
        self.chosen: tuple[int, ...] | None = None
        self.drawn: Tensor | None = None
        self.copies = nn.ModuleList()

    @staticmethod
    def network(region: Region) -> nn.Module:
        return Router(region)

    def lean_(self, weight: float) -> None:
        """Let every router prefer narrow widths, or wide ones where `weight` is negative: that, times its share of the
        units, is taken from the logit of each width."""
        for network in self.networks:
            router = cast(Router, network)
            router.lean.copy_(-weight * router.masks.sum(1) / router.masks[-1].sum())

    def choose(self, widths: Sequence[int]) -> None:
        """Take these widths for every sample from now on, until `thaw`; routers do not run and cost nothing.

        Args:
            widths: the number of one for each region, from the narrowest.

        Raises:
            GateError: not one for each region, or no such number.
        """
        regions = self.plan.regions
        count = len(regions[0].widths)
        if len(widths) != len(regions) or not all(0 <= width < count for width in widths):
            raise GateError(
                f"widths {list(widths)}: give a number from 0 to {count - 1} for each of {len(regions)} regions"
            )
        self.freeze([region.masks[width] for region, width in zip(regions, widths, strict=True)])

    def freeze(self, masks: Sequence[Tensor]) -> None:
        """As `choose`, of what the widths leave open.

        Raises:
            GateError: a mask that is no width.
        """
        super().freeze(masks)
        chosen = []
        for number, (mask, region) in enumerate(zip(masks, self.plan.regions, strict=True)):
            same = (region.masks == mask.cpu()).all(1).nonzero()
            if not len(same):
                self.thaw()
                raise GateError(f"the mask of region {number} (at {region.layer}) is none of its widths; call choose()")
            chosen.append(int(same[-1]))
        self.chosen = tuple(chosen)

    def draw(self, weights: Tensor) -> None:
        """Draw the width of every sample at random from now on, until `thaw`: what routers are worth is what is lost by
        it. They still run.

        Args:
            weights: (R, K) of the K widths in each of R regions, from 0.
        """
        self.drawn = weights

    def thaw(self) -> None:
        super().thaw()
        self.chosen = self.drawn = None

    def narrow(self, side: Side | None, width: int) -> Subset | None:
        """The channels of one side of a layer that a width leaves open; None for all."""
        if side is None:
            return None
        device = next(self.parameters()).device
        key = side, width, device
        if key not in self._subsets:  # looked up once a model, not once a call
            masks = [self.plan.regions[number].masks[width] for number in side.regions]
            known = torch.cat([*masks, torch.ones(1, dtype=torch.bool)])
            there = known[side.units].nonzero().squeeze(1)
            whole = len(there) == len(side.units)
            self._subsets[key] = None if whole else Subset(there.to(device), side.size, side.width)
        return self._subsets[key]

    def remember_(self, backbone: nn.Module) -> None:
        """Give the batch norms of a backbone what they remember of the widths that are chosen for every sample."""
        assert self.chosen is not None
        for container in self.plan.containers:
            width = self.chosen[container.region]
            for name, number in self.number.items():
                if is_inside(name, [container.name]) and width < len(self.plan.regions[0].widths) - 1:
                    known = cast(WidthNorm, self.norms[number])
                    norm = backbone.get_submodule(name)
                    replace_(norm, {"running_mean": known.mean[width], "running_var": known.var[width]})

    def route(self, number: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the router of region `number` makes of (B, C) mean features.

        Returns:
            The logits (B, K), and the choice (B, K): 1 for one width, with the gradient of the softmax in train mode.
            Where a logit is NaN, the widest is taken.
        """
        logits = cast(Router, self.networks[number])(features).float()
        last = logits.shape[1] - 1
        noisy = logits
        if self.training and self.noise > 0:
            noise = -torch.empty_like(logits).exponential_().clamp_min(1e-20).log()
            noisy = logits + self.noise * noise
        picked = noisy.argmax(1).masked_fill(logits.isnan().any(1), last)
        if self.drawn is not None:
            picked = self.drawn[number].multinomial(len(logits), replacement=True).to(logits.device)
        hard = F.one_hot(picked, last + 1).to(logits.dtype)
        if not self.training:
            return logits, hard
        soft = (noisy / TEMPERATURE).softmax(1)
        return logits, hard + (soft - soft.detach())


def gates_of(plan: GatePlan, backbone: nn.Module) -> Gates:
    """The networks that decide by a plan."""
    return Routers(plan, backbone) if plan.containers else Gates(plan)
