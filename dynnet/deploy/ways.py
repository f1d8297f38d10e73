"""The stages of a model, each in all of its widths: cut, and held against the model on images of noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynnet.deploy.checks import checked_cut
from dynnet.deploy.folding import fold
from dynnet.deploy.one_width import at_widths
from dynnet.deploy.stages import Stage, staged
from dynnet.errors import ExportError
from dynnet.exits.boundaries import Feature
from dynnet.gates.routers import Routers
from dynnet.model import DynamicModel

_SAMPLES = 4  # images of noise


@dataclass(frozen=True)
class Way:
    """A stage of one width.

    Attributes:
        name: of its file.
        stage: itself.
        fed, made: what it takes and makes of the images of noise.
        width: which one, from the narrowest; None where there is one.
        macs: of a sample that answers at its end, and had this width all the way.
        adds: of those, what it adds.
    """

    name: str
    stage: Stage
    fed: list[Tensor]
    made: list[Tensor]
    width: int | None
    macs: int
    adds: int


def in_widths(model: DynamicModel) -> Iterator[Way]:
    """All stages, in running order; of those behind a router, each width, from the narrowest.

    Args:
        model: in eval mode, with all exits on that get a stage, folded where it has one width; left as it is.

    Raises:
        ExportError: it cannot be cut.
    """
    weight = next(model.parameters())
    images = torch.randn(_SAMPLES, *model.input_size, generator=torch.Generator().manual_seed(0)).to(weight.device)
    rows = [_of_one_width(narrow, images, routers) for narrow, routers in _narrow(model)]
    for number, alike in enumerate(zip(*rows, strict=True)):
        several = number > 0 and rows[0][number - 1].stage.route is not None
        if several and len({(way.stage.takes, way.stage.gives, way.stage.route) for way in alike}) > 1:
            raise ExportError(f"the widths of stage {number} do not take and give the same; export one of them")
        for width, way in enumerate(alike) if several else [(None, alike[-1])]:
            name = f"stage_{number}" + f"_width_{width}" * several
            yield Way(name, way.stage, way.fed, way.made, width, way.macs, way.adds)


def _narrow(model: DynamicModel) -> Iterator[tuple[DynamicModel, Mapping[int, tuple[nn.Module, Feature]]]]:
    """The model in each of its widths, folded, and its routers by the exits at which they stand."""
    gates = model.gates
    if not isinstance(gates, Routers):
        yield model, {}
        return
    regions = gates.plan.regions
    routers = {
        region.segment - 1: (network, region.feature)
        for region, network in zip(regions, gates.networks, strict=True)
        if region.feature is not None
    }
    for width in range(len(regions[0].widths)):
        yield fold(at_widths(model, [width] * len(regions))), routers


def _of_one_width(model: DynamicModel, images: Tensor, routers: Mapping[int, tuple[nn.Module, Feature]]) -> list[Way]:
    stages = staged(model, model.input_size, routers)
    fed, made = checked_cut(model, stages, images)
    ledger = model.ledger()
    bill = ledger.bill(model.running)
    if model.gates is not None and model.gates.frozen is None:
        bill += torch.tensor([sum(each.macs for each in segment.deciders) for segment in ledger.segments]).cumsum(0)
    spent, deciding, found = 0, 0, []
    for number, stage in enumerate(stages):
        if stage.exit in routers:
            deciding += _macs(routers[stage.exit][0])
        macs = int(bill[stage.exit]) + deciding
        found.append(Way("", stage, fed[number], made[number], None, macs, macs - spent))
        spent = macs
    return found


def _macs(network: nn.Module) -> int:
    """Of a router, for one sample."""
    return sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear))
