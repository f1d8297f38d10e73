"""A rehearsal on the meta device: can a backbone go on without the rows that left at its exits?

Shapes tell. What still needs the whole batch (a residual sum around the boundary, a batch size that the forward noted
before it and reshapes with afterwards) fails here, before anything is attached for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynnet.backbone.dry_run import BATCH, trace
from dynnet.exits import flow
from dynnet.exits.boundaries import Boundary, Companion, Places
from dynnet.exits.flow import Flow, Tag


class _Rehearsal(Flow):
    """A third of the rows leaves at every exit."""

    def __init__(self, tag: Tag) -> None:
        super().__init__(tag, BATCH)
        self.running = BATCH

    def reach(self, index: int, output: Any, leaves: Sequence[tuple[int, int]]) -> Any:
        self.running = self.running * 2 // 3
        return self.thin_out(output, leaves, torch.arange(self.running, device="meta"))


@dataclass(frozen=True)
class Placement:
    """Boundaries, and how rows leave there.

    Attributes:
        exits: in running order.
        companions: modules that receive older tensors.
        notes_size: the backbone notes the batch size before an exit; see `dynnet.exits.flow.run`.
        problem: why rows cannot leave there; None where they can.
    """

    exits: tuple[Boundary, ...]
    companions: tuple[Companion, ...]
    notes_size: bool
    problem: str | None


def place(places: Places, exits: int | Sequence[str | float]) -> Placement:
    """Resolve exits to boundaries at which rows can really leave; fractions try everywhere before they give up.

    Raises:
        ExitError: exits that cannot be resolved at all.
    """
    placement = rehearse(places, places.resolve(exits))
    if placement.problem is None or (not isinstance(exits, int) and all(isinstance(e, str) for e in exits)):
        return placement
    usable = [boundary for boundary in places.candidates if rehearse(places, [boundary]).problem is None]
    return rehearse(places, places.among(usable).resolve(exits))


def rehearse(places: Places, exits: Sequence[Boundary]) -> Placement:
    """Let rows leave at all `exits` on the meta device, and leave the backbone as it was."""
    companions = places.companions(exits)
    problem = _attempt(places, exits, companions, notes_size=False)
    notes_size = problem is not None and _attempt(places, exits, companions, notes_size=True) is None
    return Placement(tuple(exits), tuple(companions), notes_size, None if notes_size else problem)


def _attempt(
    places: Places, exits: Sequence[Boundary], companions: Sequence[Companion], notes_size: bool
) -> str | None:
    tag = Tag()
    rehearsal = _Rehearsal(tag)

    def forward(images: Tensor) -> Any:
        with flow.run(rehearsal, notes_size):
            return places.backbone(images)

    flow.attach(places.backbone, tag, exits, companions)
    try:
        seen = trace(places.backbone, places.input_size, BATCH, forward)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        flow.detach(places.backbone)
    rows = seen.output[0].shape[0]
    return None if rows == rehearsal.running else f"{rows} rows came out where {rehearsal.running} went on"
