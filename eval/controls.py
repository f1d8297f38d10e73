"""What deciding by the input is worth: the same model, where its gates decide without looking.

Nothing is trained again, and thresholds stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dynnet import DynamicModel, measure
from dynnet.evaluation.measurement import Measurement
from dynnet.gates.freezing import mean_masks, widths_of
from dynnet.gates.networks import Gates
from dynnet.gates.routers import Routers
from dynnet.learning.randomness import seeded
from dynnet.thresholds.answers import Answers

MEAN = "frozen at the mean decision"


def controls(
    model: DynamicModel, gates: Gates, held_out: Answers, test: Iterable[Sequence[Tensor]]
) -> dict[str, Measurement]:
    """What every control gives, by its name.

    With gates on channels there is one: frozen at their mean decision on held-out images. With widths there are also
    each width for all images, and widths drawn at random, each as often as routers choose it on held-out images.

    Args:
        model: in eval mode.
        gates: its own.
        held_out: what it said of the calibration split.
        test: what is measured on.
    """
    return {
        name: _measured(model, gates, test, begin) for name, begin in _ways(gates, _arrived(model, gates, held_out))
    }


def frozen_gates(model: DynamicModel, gates: Gates, held_out: Answers, test: Iterable[Sequence[Tensor]]) -> Measurement:
    """The first of the controls alone."""
    _, begin = next(_ways(gates, _arrived(model, gates, held_out)))
    return _measured(model, gates, test, begin)


def _arrived(model: DynamicModel, gates: Gates, held_out: Answers) -> list[np.ndarray]:
    """For each region (n, U) bool, what was decided for images that came to it; for all, if none does."""
    exits = held_out.route(model.thresholds)
    came = [exits >= region.segment for region in gates.plan.regions]
    return [mask[rows] if rows.any() else mask for mask, rows in zip(held_out.masks, came, strict=True)]


def _ways(gates: Gates, masks: list[np.ndarray]) -> Iterator[tuple[str, Callable[[], None]]]:
    regions = gates.plan.regions
    yield MEAN, lambda: gates.freeze(mean_masks(masks, gates.plan))
    if not isinstance(gates, Routers):
        return
    count = len(regions[0].widths)
    often = [np.bincount(widths_of(mask, region), minlength=count) for mask, region in zip(masks, regions, strict=True)]
    yield "widths at random, as often", partial(gates.draw, torch.from_numpy(np.stack(often)).float())
    for width in range(count):
        yield f"width {width + 1} of {count} for all", partial(gates.choose, [width] * len(regions))


def _measured(
    model: DynamicModel, gates: Gates, test: Iterable[Sequence[Tensor]], begin: Callable[[], None]
) -> Measurement:
    begin()
    try:
        with seeded(0):
            return measure(model, test)
    finally:
        gates.thaw()
