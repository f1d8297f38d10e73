"""A rehearsal on the meta device: can a backbone go on without the rows that left at its exits?

Shapes tell, and the order in which samples lie in what is handed on beside a boundary. What still needs the whole
batch (a residual sum around the boundary, a batch size that the forward noted before it and reshapes with afterwards)
fails here, before anything is attached for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynnet.backbone.dry_run import BATCH, trace
from dynnet.errors import ForwardError
from dynnet.exits import flow
from dynnet.exits.boundaries import Boundary, Companion, Places
from dynnet.exits.flow import Flow, Tag, thinned
from dynnet.exits.noted_sizes import Line, NotedSizes
from dynnet.exits.placing import resolve

# Sizes of the batch in a rehearsal: primes, which are seldom the size of anything else.
_PRIMES = [n for n in range(BATCH - 1, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1))]


class _Rehearsal(Flow):
    """About as many rows leave at every exit, and as many at the end."""

    def __init__(self, tag: Tag, input_size: Sequence[int], exits: int) -> None:
        super().__init__(tag, (BATCH, *input_size))
        self.left = [_PRIMES[len(_PRIMES) * (i + 1) // (exits + 1)] for i in range(exits)]

    def reach(self, index: int, output: Any, leaves: Sequence[tuple[int, int]]) -> Any:
        before, now = self.rows.size, self.left[index]
        kept = torch.arange(now, device="meta")
        self.rows.part(index, torch.arange(now, before, device="meta"), kept)
        return thinned(output, leaves, kept)


@dataclass(frozen=True)
class Placement:
    """Boundaries, and how rows leave there.

    Attributes:
        exits: in running order.
        companions: modules that receive older tensors.
        noted: where the backbone reshapes to a size of the batch that it noted before an exit.
        problem: why rows cannot leave there; None where they can.
    """

    exits: tuple[Boundary, ...]
    companions: tuple[Companion, ...]
    noted: frozenset[Line]
    problem: str | None


def place(places: Places, exits: int | Sequence[str | float]) -> Placement:
    """Resolve exits to boundaries at which rows can really leave; fractions try everywhere before they give up.

    Raises:
        ExitError: exits that cannot be resolved at all.
    """
    placement = rehearse(places, resolve(places, exits))
    if placement.problem is None or (not isinstance(exits, int) and all(isinstance(e, str) for e in exits)):
        return placement
    usable = [boundary for boundary in places.candidates if rehearse(places, [boundary]).problem is None]
    return rehearse(places, resolve(places.among(usable), exits))


def rehearse(places: Places, exits: Sequence[Boundary]) -> Placement:
    """Let rows leave at all `exits` on the meta device."""
    companions = places.companions(exits)
    apart = [companion.name for companion in companions if not companion.together]
    if apart:
        told = (
            f"what {apart[0]!r} receives beside them does not hold the rows of a sample side by side: samples are "
            f"folded inside, or in an order that nobody can tell"
        )
        return Placement(tuple(exits), tuple(companions), frozenset(), told)
    problem, _ = _attempt(places, exits, companions, correcting=False)
    noted: set[Line] = set()
    if problem is not None:
        still, noted = _attempt(places, exits, companions, correcting=True)
        problem = None if still is None else f"what follows still needs the whole batch ({problem})"
    return Placement(tuple(exits), tuple(companions), frozenset(() if problem else noted), problem)


class Wrapped(Protocol):
    """What a rehearsal asks of a wrapped model."""

    backbone: nn.Module
    tag: Tag

    @property
    def exits(self) -> Sequence[str]: ...


def lines_at(model: Any, input_size: tuple[int, ...]) -> frozenset[Line]:
    """Where the forward of a wrapped model reshapes to a noted size on images of another size than it was wrapped for,
    on which it may take other ways.

    Args:
        model: wrapped (`Wrapped`, and a module).
        input_size: (C, H, W).

    Raises:
        ForwardError: rows cannot leave it on such images.
    """
    met: set[Line] = set()

    def forward(twin: Wrapped, images: Tensor) -> None:
        rehearsal = _Rehearsal(twin.tag, input_size, len(twin.exits))
        noted = NotedSizes(rehearsal.rows, None)
        with flow.run(rehearsal, noted):
            twin.backbone(images)
        met.update(noted.met)

    trace(model, input_size, BATCH, forward)
    return frozenset(met)


def _attempt(
    places: Places, exits: Sequence[Boundary], companions: Sequence[Companion], correcting: bool
) -> tuple[str | None, set[Line]]:
    """What went wrong, and where noted sizes were corrected."""
    tag = Tag()
    rehearsal = _Rehearsal(tag, places.input_size, len(exits))
    noted = NotedSizes(rehearsal.rows, None) if correcting else None

    def forward(twin: nn.Module, images: Tensor) -> Any:
        with flow.run(rehearsal, noted):
            return twin(images)

    flow.attach(places.twin, tag, exits, companions)
    try:
        seen = trace(places.twin, places.input_size, BATCH, forward)
    except ForwardError as error:
        return str(error), set()
    finally:
        flow.detach(places.twin)
    came, went = seen.output[0].shape[0] if seen.output else 0, rehearsal.rows.size
    return None if came == went else f"{came} rows came out where {went} went on", noted.met if noted else set()
