"""What the gates have decided in one call, how layers run under it, and what it costs.

Masked, a closed channel is zero for every layer that reads it; that defines the result. Sparse, it is not computed at
all: layers that make it leave it out, layers that read it read less. Both give the same answer.

    B rows of the batch, C channels of a layer, U units of a region
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynnet.backbone.layers.kind import HALF
from dynnet.backbone.layers.table import channel_dim, run
from dynnet.backbone.modes import evaluating
from dynnet.backbone.subsets import Subset
from dynnet.cost.ledger import Ledger
from dynnet.exits.rows import Rows
from dynnet.gates.networks import Gates
from dynnet.gates.plan import Side, Site

_SPARSE = 0.8  # of a region's units: if more are open for some row of a batch, it pays to compute all


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

    def apply(self, site: Site, layer: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        """Run one layer.

        Args:
            site: of the layer.
            layer: itself.
            x: its input, (B, ...) or several entries of the first dimension per sample.
            rows: who is still in the batch.
        """
        reads = self.subset(site.reads)
        if site.reads is not None and site.zeroes and not self._agreed.issuperset(site.reads.regions):
            mask = self._mask(site.reads, reads, x, channel_dim(layer, x))
            # Nobody else wants to see what is closed, so without gradients memory is written once.
            dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
            x = x.mul_(mask) if dense and not torch.is_grad_enabled() else x * mask
        if site.decides is not None:
            self._decide(site.decides, layer, x, rows, reads)
        return run(layer, x, reads, self.subset(site.makes))

    def arrive(self, exit: int, output: Any, rows: Rows) -> None:
        """Samples go on from an exit.

        Args:
            exit: its number.
            output: of its boundary, of those that go on.
            rows: who they are.
        """

    def price(self, ledger: Ledger, size: int) -> Tensor:
        """What gates add to a bill: their networks, less what closed channels save.

        Args:
            ledger: with the prices of the sites.
            size: B of the call.

        Returns:
            (B, E + 1) by segment, mostly negative: int64, or differentiable floats in train mode.
        """
        device = next((t.decisions.device for t in self.taken.values()), next(self.gates.parameters()).device)
        exact = not self.gates.training
        dtype = torch.int64 if exact else torch.float32
        counts: dict[Side, Tensor] = {}

        def channels(side: Side) -> Tensor:
            if side not in counts:
                covered = self._known(side)[:, side.units_on(device)].sum(1) * side.size
                counts[side] = covered.round().long() if exact else covered
            return counts[side]

        bills = []
        for segment in ledger.segments:
            bill = torch.zeros(size, dtype=dtype, device=device)
            for region, macs, _ in segment.deciders if self.gates.frozen is None else ():
                if region in self.taken:
                    taken = self.taken[region]
                    cost = torch.full((len(taken.decisions),), macs, dtype=dtype, device=device)
                    bill = _added(bill, taken.rows, cost)
            for layer in segment.switched:
                region = layer.sides[0].regions[0]  # one segment has them all
                if region in self.taken:
                    bill = _added(bill, self.taken[region].rows, layer.at(channels) - layer.cost)
            bills.append(bill)
        return torch.stack(bills, 1)

    def open_rates(self) -> Tensor:
        """(R,) share of the units that are open, by region, over all rows that were decided on."""
        return torch.stack([self.taken[n].decisions.mean() for n in sorted(self.taken)])

    def _decide(self, number: int, layer: nn.Module, x: Tensor, rows: Rows, reads: Subset | None) -> None:
        if self.gates.frozen is not None:
            decisions = self.gates.frozen[number].to(x.device, torch.float32).expand(rows.size, -1)
            self.take(number, Taken(rows.here, decisions, decisions))
            return
        dims = [d for d in range(1, x.ndim) if d != channel_dim(layer, x)]
        # Half the time of `mean`.
        features = x
        if dims:
            wide = torch.float32 if x.dtype in HALF else x.dtype
            features = (x.sum(dims, dtype=wide) / math.prod(x.shape[d] for d in dims)).to(x.dtype)
        if x.shape[0] != rows.size:  # windows, several a sample
            features = features.unflatten(0, (rows.size, -1)).mean(1)
        if reads is not None:
            whole = features.new_zeros(len(features), reads.width)
            features = whole.index_copy(1, reads.channels(), features)
        self.take(number, Taken(rows.here, *self.gates.decide(number, features)))

    def take(self, number: int, taken: Taken) -> None:
        """A region has decided."""
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
        # Windows: several entries a sample. (`len` would make a constant of the batch where a graph is traced.)
        each = int(x.shape[0] // self.taken[side.regions[0]].decisions.shape[0])
        key = side, each, x.dtype
        if key not in self._masks:
            units = side.units_of_channels(x.device)
            mask = self._known(side).index_select(1, units if there is None else there.take(units, 0))
            self._masks[key] = (mask if each == 1 else mask.repeat_interleave(each, 0)).to(x.dtype)
        return self._masks[key].view([x.shape[d] if d in (0, dim) else 1 for d in range(x.ndim)])

    def _known(self, side: Side) -> Tensor:
        """(B, U) decisions of a side's regions, and behind them what is always open, where the side has that."""
        decisions = [self.taken[n].decisions for n in side.regions]
        if side.partly:
            decisions.append(decisions[0].new_ones(decisions[0].shape[0], 1))
        return decisions[0] if len(decisions) == 1 else torch.cat(decisions, 1)

    def subset(self, side: Side | None) -> Subset | None:
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


def least_macs(gates: Gates, ledger: Ledger) -> list[int]:
    """What gates add to each of the E + 1 segments where they decide for the least that they can."""
    decisions = Decisions(gates, sparse=False)
    for number, region in enumerate(gates.plan.regions):
        one = region.least[None].float()
        decisions.taken[number] = Taken(None, one, one)
    with evaluating(gates):
        return [int(macs) for macs in decisions.price(ledger, 1)[0]]
