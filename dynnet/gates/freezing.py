"""Gates that decide alike for every image: the mean decision, and the static network that it leaves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dynnet.backbone.layers.table import cut_, kind_of
from dynnet.errors import GateError
from dynnet.gates.decisions import Decisions, Taken
from dynnet.gates.networks import Gates
from dynnet.gates.plan import GatePlan, Region
from dynnet.gates.routers import Routers


def mean_masks(masks: Sequence[np.ndarray], plan: GatePlan) -> list[Tensor]:
    """The decisions that gates take on average, for `Gates.freeze`.

    Of every group as many units as are open on average, rounded, those that are open most often: about the same compute
    for every image. Of widths, the one in the middle of what routers choose.

    Args:
        masks: for each region (N, U) bool, what was decided for N images.
        plan: of the gates.
    """
    found = []
    for mask, region in zip(masks, plan.regions, strict=True):
        if region.widths:
            found.append(region.masks[round(float(np.mean(widths_of(mask, region))))])
            continue
        rates = torch.from_numpy(mask).double().mean(0)
        steady = torch.zeros(region.units, dtype=torch.bool)
        for part, rate in zip(steady.split(region.groups), rates.split(region.groups), strict=True):
            part[rate.topk(max(1, round(float(rate.sum())))).indices] = True
        found.append(steady)
    return found


def widths_of(masks: np.ndarray, region: Region) -> np.ndarray:
    """(N,) int64, which width of a region each of (N, U) decisions is."""
    units = region.masks.sum(1).numpy()
    return np.searchsorted(units, masks.sum(1))


def cut_frozen_(backbone: nn.Module, gates: Gates) -> None:
    """Cut every gated layer to what frozen gates leave open, in place: a static network, with nothing to decide.

    Args:
        backbone: the gates' own, unwrapped.
        gates: frozen. Answers stay the same, unless a norm over channels is gated: it then sees only what is left.

    Raises:
        GateError: the gates are not frozen.
    """
    if gates.frozen is None:
        raise GateError("these gates decide by the input; freeze them first")
    decisions, device = Decisions(gates, sparse=True), next(gates.parameters()).device
    for number, mask in enumerate(gates.frozen):
        row = mask[None].to(device, torch.float32)
        decisions.take(number, Taken(None, row, row))
    if isinstance(gates, Routers):
        gates.remember_(backbone)
    for site in gates.plan.sites:
        layer = backbone.get_submodule(site.layer)
        if kind_of(layer) is not None:  # what stands for a folded norm has no channels of its own
            cut_(layer, decisions.subset(site.reads), decisions.subset(site.makes))
