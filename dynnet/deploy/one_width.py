"""A model of several widths as one of the narrow models that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dynnet.backbone.twin import copy_of
from dynnet.config import WrapConfig
from dynnet.errors import GateError
from dynnet.exits.heads import heads_by_name
from dynnet.gates.freezing import cut_frozen_
from dynnet.gates.routers import Routers
from dynnet.model import DynamicModel
from dynnet.wrapping import wrap


def at_widths(model: DynamicModel, widths: Sequence[int]) -> DynamicModel:
    """What a sample runs through that has these widths: layers cut for good, the same exits, no routers.

    Args:
        model: with routers; left as it is.
        widths: the number of a width for each region, from the narrowest.

    Raises:
        GateError: a model without routers, or no such widths.
    """
    if not isinstance(model.gates, Routers):
        raise GateError("this model has no routers; wrap it with gates='width'")
    twin = copy_of(model)
    gates, heads = twin.gates, dict(zip(twin.exits, twin.heads, strict=True))
    assert isinstance(gates, Routers)
    gates.choose(widths)
    backbone = twin.unwrap()
    cut_frozen_(backbone, gates)
    config = replace(model.config, gates=None, confidence=WrapConfig().confidence)
    narrow = wrap(backbone, config, heads=heads_by_name(heads))
    narrow.measure = model.measure  # which may be somebody's own
    narrow.thresholds = model.thresholds
    return narrow
