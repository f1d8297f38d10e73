"""Gate networks, and layers that compute only the channels that they leave open.

At the entry of a region its network reads the mean of the features and gives every unit a logit; a unit is open where
that is not negative. Masked, a closed channel is zero for every layer that reads it; that defines the result. Sparse,
it is not computed at all: layers that make it leave it out, layers that read it read less. Both give the same answer.

Training follows Li et al., "Dynamic Dual Gating Neural Networks" (DGNet, ICCV 2021): logistic noise on the logits and a
temperature, hard decisions forward, the gradient of the sigmoid backward (straight through).

    B rows of the batch, C channels of a layer, U units of a region
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dynnet.backbone.dry_run import evaluating
from dynnet.backbone.kinds import channel_dim
from dynnet.channels.slicing import HALF, Subset, cut, run
from dynnet.cost.ledger import Ledger
from dynnet.errors import GateError
from dynnet.exits import flow
from dynnet.exits.flow import Flow, Tag
from dynnet.gates.plan import GatePlan, Region, Side, Site

TEMPERATURE = 2 / 3  # of the sigmoid, as in DGNet
_SPARSE = 0.8  # of a region's units: if more are open for some row of a batch, it pays to compute all
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
        largest = logits.new_full((len(logits), self.groups), -torch.inf).scatter_reduce(1, group, logits, "amax")
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
        self.networks = nn.ModuleList(GateNetwork(region) for region in plan.regions)
        self.noise = 1.0
        self.frozen: tuple[Tensor, ...] | None = None

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

    def least(self, ledger: Ledger) -> list[int]:
        """What gates add to each of the E + 1 segments where one unit of every group is open, the smallest."""
        decisions = Decisions(self, sparse=False)
        for number, region in enumerate(self.plan.regions):
            one = torch.zeros(1, region.units)
            one[0, np.cumsum(region.groups) - 1] = 1
            decisions.taken[number] = Taken(None, one, one)
        with evaluating(self):
            return [int(macs) for macs in decisions.price(ledger, 1)[0]]

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


class Taken(NamedTuple):
    """What one region has decided.

    Attributes:
        rows: (b,) int64, the samples of the call that were still in the batch; None for all.
        logits: (b, U).
        decisions: (b, U), 1 open, 0 closed.
    """

    rows: Tensor | None
    logits: Tensor
    decisions: Tensor


class Decisions:
    """What the gates have decided in one call of one model, and how layers run under it.

    Attributes:
        taken: by region, in the order in which they decided.
    """

    def __init__(self, gates: Gates, sparse: bool) -> None:
        self.gates, self.sparse = gates, sparse
        self.taken: dict[int, Taken] = {}
        self._computed: dict[int, list[float]] = {}  # by region, 1 for units that are computed, where some are not
        self._agreed: set[int] = set()  # regions of which nothing is computed that is closed for any row
        self._subsets: dict[Side, Subset | None] = {}
        self._masks: dict[tuple[Side, int, torch.dtype], Tensor] = {}

    def apply(self, site: Site, layer: nn.Module, x: Tensor, of: Flow) -> Tensor:
        """Run one layer.

        Args:
            site: of the layer.
            layer: itself.
            x: its input, (B, ...) or several entries of the first dimension per sample.
            of: the running flow, which knows who is still in the batch.
        """
        reads = self._subset(site.reads)
        if site.reads is not None and site.zeroes and not self._agreed.issuperset(site.reads.regions):
            mask = self._mask(site.reads, reads, x, channel_dim(layer, x))
            # Nobody else wants to see what is closed, so without gradients memory is written once.
            dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
            x = x.mul_(mask) if dense and not torch.is_grad_enabled() else x * mask
        if site.decides is not None:
            self._decide(site.decides, layer, x, of, reads)
        return run(layer, x, reads, self._subset(site.makes))

    def price(self, ledger: Ledger, size: int) -> Tensor:
        """What gates add to a bill: their networks, less what closed channels save.

        Args:
            ledger: with the prices of the sites.
            size: B of the call.

        Returns:
            (B, E + 1) by segment, mostly negative: int64, or differentiable floats in train mode.
        """
        plan = self.gates.plan
        device = next((t.decisions.device for t in self.taken.values()), next(self.gates.parameters()).device)
        exact = not self.gates.training
        dtype = torch.int64 if exact else torch.float32
        bill = [torch.zeros(size, dtype=dtype, device=device) for _ in ledger.segments]
        counts: dict[Side, Tensor] = {}

        def channels(side: Side) -> Tensor:
            if side not in counts:
                covered = self._known(side)[:, side.units_on(device)].sum(1) * side.size
                counts[side] = covered.round().long() if exact else covered
            return counts[side]

        for number, taken in self.taken.items() if self.gates.frozen is None else ():
            region = plan.regions[number]
            cost = torch.full((len(taken.decisions),), region.macs, dtype=dtype, device=device)
            bill[region.segment] = _added(bill[region.segment], taken.rows, cost)
        for site in ledger.sites:
            number = site.regions[0]
            if number in self.taken:
                segment = plan.regions[number].segment
                bill[segment] = _added(bill[segment], self.taken[number].rows, site.at(channels) - site.macs)
        return torch.stack(bill, 1)

    def open_rates(self) -> Tensor:
        """(R,) share of the units that are open, by region, over all rows that were decided on."""
        return torch.stack([self.taken[n].decisions.mean() for n in sorted(self.taken)])

    def _decide(self, number: int, layer: nn.Module, x: Tensor, of: Flow, reads: Subset | None) -> None:
        if self.gates.frozen is not None:
            decisions = self.gates.frozen[number].to(x.device, torch.float32).expand(of.size, -1)
            self._take(number, Taken(of.rows, decisions, decisions))
            return
        dims = [d for d in range(1, x.ndim) if d != channel_dim(layer, x)]
        # Half the time of `mean`.
        features = x
        if dims:
            wide = torch.float32 if x.dtype in HALF else x.dtype
            features = (x.sum(dims, dtype=wide) / math.prod(x.shape[d] for d in dims)).to(x.dtype)
        if len(x) != of.size:  # windows, several a sample
            features = features.unflatten(0, (of.size, -1)).mean(1)
        if reads is not None:
            whole = features.new_zeros(len(features), reads.width)
            features = whole.index_copy(1, reads.channels(), features)
        self._take(number, Taken(of.rows, *self.gates.decide(number, features)))

    def _take(self, number: int, taken: Taken) -> None:
        self.taken[number] = taken
        if not self.sparse:
            return
        decisions = taken.decisions
        if len(decisions) == 1 or self.gates.frozen is not None:
            self._computed[number] = decisions[0].tolist()
            self._agreed.add(number)
            return
        computed = decisions.amax(0).tolist()  # whatever is open for one of the rows
        if sum(computed) <= _SPARSE * len(computed):
            self._computed[number] = computed

    def _mask(self, side: Side, there: Subset | None, x: Tensor, dim: int) -> Tensor:
        """(B, 1, .., C, .., 1) decisions for the channels of one side of a layer, as far as they are there."""
        key = side, len(x), x.dtype
        if key not in self._masks:
            units = side.units_of_channels(x.device)
            mask = self._known(side).index_select(1, units if there is None else there.take(units, 0))
            if len(x) != len(mask):  # windows, several a sample
                mask = mask.repeat_interleave(len(x) // len(mask), 0)
            self._masks[key] = mask.to(x.dtype)
        return self._masks[key].view([x.shape[d] if d in (0, dim) else 1 for d in range(x.ndim)])

    def _known(self, side: Side) -> Tensor:
        """(B, U) decisions of a side's regions, and behind them what is always open, where the side has that."""
        decisions = [self.taken[n].decisions for n in side.regions]
        if side.partly:
            decisions.append(decisions[0].new_ones(len(decisions[0]), 1))
        return decisions[0] if len(decisions) == 1 else torch.cat(decisions, 1)

    def _subset(self, side: Side | None) -> Subset | None:
        """The channels of one side of a layer that are computed; None if all are."""
        if side is None or not any(n in self._computed for n in side.regions):
            return None
        if side not in self._subsets:
            # Lists, not tensors: a hundred numbers take less time than two operators.
            regions = self.gates.plan.regions
            known = [on for n in side.regions for on in self._computed.get(n, [1.0] * regions[n].units)]
            known.append(1.0)
            blocks = [block for block, unit in enumerate(side.unit_list) if known[unit]]
            whole = len(blocks) == len(side.unit_list)
            device = self.taken[side.regions[0]].decisions.device
            self._subsets[side] = None if whole else Subset(torch.tensor(blocks, device=device), side.size, side.width)
        return self._subsets[side]


def _added(bill: Tensor, rows: Tensor | None, cost: Tensor) -> Tensor:
    cost = cost.to(bill.dtype)
    return bill + cost if rows is None else bill.index_add(0, rows, cost)


class GatedForward:
    """Stands in for the `forward` of one layer, and leaves it alone unless gates are deciding.

    An attribute of the instance: the layer keeps its class, its parameters and its name, and copies take it along.
    """

    def __init__(self, layer: nn.Module, site: Site, tag: Tag) -> None:
        self.layer, self.site, self.tag = layer, site, tag

    def __call__(self, x: Tensor) -> Tensor:
        running = flow.running(self.tag)
        if running is None or running.decisions is None:
            return run(self.layer, x, None, None)
        return running.decisions.apply(self.site, self.layer, x, running)


def mean_masks(masks: Sequence[np.ndarray], plan: GatePlan) -> list[Tensor]:
    """The decisions that gates take on average, for `Gates.freeze`.

    Of every group as many units as are open on average, rounded, those that are open most often: about the same compute
    for every image.

    Args:
        masks: for each region (N, U) bool, what was decided for N images.
        plan: of the gates.
    """
    found = []
    for mask, region in zip(masks, plan.regions, strict=True):
        rates = torch.from_numpy(mask).double().mean(0)
        steady = torch.zeros(region.units, dtype=torch.bool)
        for part, rate in zip(steady.split(region.groups), rates.split(region.groups), strict=True):
            part[rate.topk(max(1, round(float(rate.sum())))).indices] = True
        found.append(steady)
    return found


def cut_frozen(backbone: nn.Module, gates: Gates) -> None:
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
        decisions._take(number, Taken(None, row, row))
    for site in gates.plan.sites:
        cut(backbone.get_submodule(site.layer), decisions._subset(site.reads), decisions._subset(site.makes))


def attach(backbone: nn.Module, tag: Tag, plan: GatePlan) -> None:
    """Let the layers of a backbone listen to gates; `detach` undoes it.

    Raises:
        GateError: a layer has a `forward` set on the instance, which would be lost; nothing is attached.
    """
    for site in plan.sites:
        if "forward" in vars(backbone.get_submodule(site.layer)):
            raise GateError(
                f"{site.layer} has a forward of its own, set on the instance; remove it, or exclude the layer"
            )
    for site in plan.sites:
        layer: Any = backbone.get_submodule(site.layer)
        layer.forward = GatedForward(layer, site, tag)


def detach(backbone: nn.Module) -> None:
    """Give every layer its own forward back."""
    for module in backbone.modules():
        if _is_gated(module):
            del module.__dict__["forward"]


def is_attached(backbone: nn.Module) -> bool:
    return any(_is_gated(module) for module in backbone.modules())


def _is_gated(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), GatedForward)
