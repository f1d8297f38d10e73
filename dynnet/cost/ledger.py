"""The ledger: what every part of a model costs, and the bill of a sample that left at a given exit.

A tree: segments in the order in which they run, and in a segment what can run narrower, as gates decide. A sample's
bill is a path through it, and equals what a counter sees when that sample runs alone (`dynnet.backbone.counting`).

    E exits, counted from 0; the backbone's own head is number E; B samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynnet.backbone.dry_run import Trace
from dynnet.cost.widths import Narrowable


class Switch(NamedTuple):
    """A layer of the backbone that gates can narrow.

    Attributes:
        layer: its name.
        sides: of the layer, as in `Narrowable`.
        segment: in which it runs.
    """

    layer: str
    sides: tuple[Any, ...]
    segment: int


class Decider(NamedTuple):
    """A gate network: which region it decides on, what it costs, and the segment in which it runs."""

    region: int
    macs: int
    segment: int


@dataclass(frozen=True)
class Segment:
    """What runs between two decision points, for one sample.

    Attributes:
        macs: of the backbone, with all channels.
        head: of the exit head at its end; 0 for the last segment, whose head is the backbone's own.
        switched: layers that may run narrower; they are part of `macs`.
        deciders: gate networks that run in it; no part of `macs`.
    """

    macs: int
    head: int = 0
    switched: tuple[Narrowable, ...] = ()
    deciders: tuple[Decider, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """Prices of one model at one input size, for one sample run alone.

    Attributes:
        segments: up to the first exit, between exits, and after the last: E + 1.
        unpriced: ops that do arithmetic nobody has told the price of, each with the modules in which it runs. Where
            there are any, every figure is a lower bound.
        first: the segment with which the network begins that the model is compared with; of a cascade, its last member.
    """

    segments: tuple[Segment, ...]
    unpriced: dict[str, tuple[str, ...]]
    first: int = 0

    @property
    def dense(self) -> int:
        """MACs of the bare backbone; of a cascade, of its last member alone."""
        return sum(segment.macs for segment in self.segments[self.first :])

    @property
    def heads(self) -> tuple[int, ...]:
        """MACs of the E exit heads."""
        return tuple(segment.head for segment in self.segments[:-1])

    def bill(self, running: Sequence[bool]) -> Tensor:
        """(E + 1,) int64: MACs of a sample that answers at each exit, with all channels.

        Args:
            running: which heads do; one that is switched off costs nothing.
        """
        spent = [
            segment.macs + (segment.head if on else 0)
            for segment, on in zip(self.segments, [*running, True], strict=True)
        ]
        return torch.tensor(spent).cumsum(0)


def price(
    seen: Trace, exits: Sequence[str], switches: Sequence[Switch] = (), deciders: Sequence[Decider] = (), first: int = 0
) -> Ledger:
    """The prices of a model whose `backbone` has boundaries `exits`, where its `heads` answer.

    Args:
        seen: a dry run of the model in which all heads answered and nothing was gated.
        exits: module names.
        switches, deciders: of the model's gates.
        first: as in `Ledger`.
    """
    calls = {call.name: call for call in seen.calls}
    heads = [_below(seen, f"heads.{i}") for i in range(len(exits))]
    # A boundary's call ends after its head has run, so what is spent by then includes all heads so far.
    ends = [calls[f"backbone.{name}"].macs - sum(heads[: i + 1]) for i, name in enumerate(exits)]
    ends.append(seen.macs - sum(heads))
    segments = [
        Segment(
            end - start,
            head,
            tuple(
                Narrowable(macs, switch.sides)
                for switch in switches
                if switch.segment == number and (macs := seen.layers[f"backbone.{switch.layer}"])
            ),
            tuple(decider for decider in deciders if decider.segment == number),
        )
        for number, (start, end, head) in enumerate(zip([0, *ends], ends, [*heads, 0], strict=False))
    ]
    return Ledger(tuple(segments), {op: tuple(sorted(names)) for op, names in seen.unpriced.items()}, first)


def _below(seen: Trace, module: str) -> int:
    return sum(macs for name, macs in seen.layers.items() if name == module or name.startswith(module + "."))
