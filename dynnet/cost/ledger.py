"""The ledger: what every part of a model costs, and the bill of a sample that left at a given exit.

MACs are multiply-adds of convolutions, matrix products and attention, as `torch.utils.flop_counter` counts them;
FLOPs = 2 x MACs. Norms, activations, pooling and additions are free by the field's convention.

    E exits, counted from 0; the backbone's own head is number E; B samples
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynnet.backbone.dry_run import Trace, trace
from dynnet.errors import InputError
from dynnet.gates.plan import Side, Site


@dataclass(frozen=True, eq=False)
class SitePrice:
    """A layer that gates switch.

    Attributes:
        macs: with all channels, for one sample.
        reads, makes: covers of its inputs and outputs; None where nothing is switched.
        tied: outputs are made group by group from inputs of the same decision (depthwise and grouped convolutions).
    """

    macs: int
    reads: Side | None
    makes: Side | None
    tied: bool

    @property
    def regions(self) -> tuple[int, ...]:
        """Numbers of the regions that decide on it; all stand in one segment."""
        return tuple(n for side in (self.reads, self.makes) if side is not None for n in side.regions)

    def at(self, channels: Callable[[Side], Tensor]) -> Tensor:
        """(B,) MACs, where `channels` tells how many channels (B,) of a side are open."""
        sides = [side for side in (self.reads, self.makes) if side is not None][: 1 if self.tied else 2]
        macs: Any = self.macs // math.prod(side.width for side in sides)
        for side in sides:
            macs = macs * channels(side)
        return cast(Tensor, macs)


@dataclass(frozen=True)
class Ledger:
    """Prices of one model at one input size, for one sample run alone.

    Attributes:
        segments: MACs of the backbone up to the first exit, between exits, and after the last: E + 1 numbers.
        heads: MACs of the E exit heads.
        unpriced: ops that do arithmetic nobody has told the price of, each with the modules in which it runs. Where
            there are any, every figure is a lower bound.
        sites: layers that gates switch; what they save and the gate networks cost is no part of `segments`.
    """

    segments: tuple[int, ...]
    heads: tuple[int, ...]
    unpriced: dict[str, tuple[str, ...]]
    sites: tuple[SitePrice, ...] = ()

    @property
    def dense(self) -> int:
        """MACs of the bare backbone."""
        return sum(self.segments)

    def bill(self, active: Sequence[bool]) -> Tensor:
        """(E + 1,) int64: MACs of a sample that answers at each exit.

        Args:
            active: which heads run; a head that is switched off costs nothing.
        """
        heads = [macs if on else 0 for macs, on in zip(self.heads, active, strict=True)]
        return (torch.tensor(self.segments) + torch.tensor([*heads, 0])).cumsum(0)


def price(
    model: nn.Module,
    forward: Callable[[Tensor], Any],
    input_size: tuple[int, ...],
    exits: Sequence[str],
    sites: Sequence[Site] = (),
) -> Ledger:
    """Price a model whose `backbone` has boundaries `exits`, where its `heads` answer when `forward` is called.

    Args:
        model, forward, input_size: as for `dynnet.backbone.dry_run.trace`; nothing may be gated.
        exits: module names.
        sites: layers of the backbone that gates will switch.

    Raises:
        InputError: the model cannot take images of this size.
    """
    try:
        seen = trace(model, input_size, 1, forward)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise InputError(f"the backbone cannot take images of size {tuple(input_size)}: {error}") from error
    calls = {call.name: call for call in seen.calls}
    heads = [_below(seen, f"heads.{i}") for i in range(len(exits))]
    # A boundary's call ends after its head has run, so what is spent by then includes all heads so far.
    ends = [calls[f"backbone.{name}"].macs - sum(heads[: i + 1]) for i, name in enumerate(exits)]
    ends.append(seen.macs - sum(heads))
    segments = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    gated = [
        SitePrice(seen.layers[f"backbone.{site.layer}"], site.reads, site.makes, site.tied)
        for site in sites
        if seen.layers[f"backbone.{site.layer}"]
    ]
    unpriced = {op: tuple(sorted(names)) for op, names in seen.unpriced.items()}
    return Ledger(segments, tuple(heads), unpriced, tuple(gated))


def _below(seen: Trace, module: str) -> int:
    return sum(macs for name, macs in seen.layers.items() if name == module or name.startswith(module + "."))
