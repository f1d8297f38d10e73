"""`consolidate`: gates that decide channel by channel, made into a few nested widths, which engines can run.

What gates open most often comes first; the widths are the first channels in that order, and a router at each exit picks
one of them. (Nested widths: Yu et al., "Slimmable Neural Networks", https://arxiv.org/abs/1812.08928)

    N samples, K widths, U units, C channels
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from dynnet.backbone.batches import Loader
from dynnet.backbone.twin import copy_of
from dynnet.channels.finding import find_groups
from dynnet.channels.groups import Group, Member
from dynnet.config import WrapConfig
from dynnet.deploy.one_width import at_widths
from dynnet.errors import GateError
from dynnet.exits.confidence import MEASURES
from dynnet.gates.plan import GatePlan
from dynnet.gates.routers import Routers, WidthNorm
from dynnet.model import DynamicModel
from dynnet.pruning.norms import recalibrate_
from dynnet.pruning.ordering import reorder_
from dynnet.thresholds.answers import collect
from dynnet.wrapping import wrap

_STEP = 1 / 16  # between shares of widths that are found


def consolidate(
    model: DynamicModel,
    loader: Loader,
    widths: int | Sequence[float] = 4,
    *,
    exits: Sequence[str | float] | None = None,
    unit: int = 8,
) -> DynamicModel:
    """Make the gates of a model into a few nested widths, which run as dense, narrow networks.

    >>> import timm, torch, dynnet
    >>> gated = dynnet.wrap(timm.create_model("cifar_resnet20"), exits=["layer1"], gates="channel").eval()
    >>> loader = [(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))]
    >>> model = consolidate(gated, loader, widths=[0.25, 0.5, 1.0])
    >>> model.predict(torch.randn(2, 3, 32, 32)).macs.shape
    torch.Size([2])

    Args:
        model: with gates on channels, trained; left as it is.
        loader: batches of (images (B, C, H, W), ...), shuffled: they tell which channels are open how often, and what
            batch norms remember of each width.
        widths: shares of the units of every group, rising; or how many, K: quantiles of the share that the gates leave
            open, the last of them all.
        exits: where routers stand, as for `dynnet.wrap`; by default where the model has exits. Those that it has keep
            their heads and thresholds; others begin anew, with thresholds at inf.
        unit: neighbouring channels that go together: widths are multiples of it.

    Returns:
        A model in eval mode whose routers have not learnt yet: train it (`training.train`, with a `consolidate` section
        in the recipe), then calibrate it.

    Raises:
        GateError: no gates on channels, no such widths, or nothing that can be narrowed behind the first exit.
        DataError: an empty loader.
    """
    gates, config = model.gates, model.config.gates
    if gates is None or config is None or isinstance(gates, Routers):
        raise GateError("there are no gates on channels to consolidate; wrap with gates='channel', and train them")
    loader = list(loader) if isinstance(loader, Iterator) else loader  # it is gone through several times
    twin = copy_of(model).eval()
    masks = collect(twin, loader).masks
    of_widths = replace(config, unit=unit, widths=_shares(widths, masks))
    heads = {name: (head, t) for name, head, t in zip(twin.exits, twin.heads, twin.thresholds, strict=True)}
    names = twin.exits if exits is None else tuple(exits)
    measure = twin.measure
    known = measure.name if measure.name in MEASURES else WrapConfig().confidence
    config_of_widths = replace(model.config, exits=names, gates=of_widths, confidence=known)
    found = wrap(twin.unwrap(), config_of_widths, heads=lambda boundary, _: heads.get(boundary.name, (None,))[0])
    if measure.name not in MEASURES:  # somebody's own
        found.measure, found.config = measure, replace(found.config, confidence=measure.name)
    _sort_(found, _openness(gates.plan, masks))
    before = [heads.get(name, (None, float("inf")))[1] for name in found.exits]
    found.thresholds = [measure.rescaled(threshold, len(found.exits)) for threshold in before]
    _measure_norms_(found, loader)
    return found.eval()


def _shares(widths: int | Sequence[float], masks: Sequence[np.ndarray]) -> tuple[float, ...]:
    """Shares of the units: those that are given, or as many as are wanted, of about as many samples each.

    Args:
        widths: as for `consolidate`.
        masks: for each region (N, U) bool, what was open.
    """
    if not isinstance(widths, int):
        return tuple(widths)
    if widths < 2 or widths > round(1 / _STEP):
        raise GateError(f"widths={widths}: give 2 or more, or shares of the channels, such as (0.25, 0.5, 0.75, 1.0)")
    opened = np.concatenate(masks, 1).mean(1)
    steps = [round(np.quantile(opened, (k + 0.5) / widths) / _STEP) for k in range(widths - 1)] + [round(1 / _STEP)]
    for k in range(1, widths):  # each at least one step above the one before,
        steps[k] = max(steps[k], steps[k - 1] + 1)
    for k in reversed(range(widths)):  # and none above all
        steps[k] = min(max(steps[k], k + 1), round(1 / _STEP) - (widths - 1 - k))
    return tuple(step * _STEP for step in steps)


def _openness(plan: GatePlan, masks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """By layer, (C,) for what share of the samples each of its outputs is open.

    Args:
        plan: of the gates.
        masks: for each region (N, U) bool, what was open.
    """
    found = {}
    for site in plan.sites:
        if site.makes is not None:
            rates = np.concatenate([*(masks[number].mean(0) for number in site.makes.regions), np.ones(1)])
            found[site.layer] = rates[site.makes.units.numpy()].repeat(site.makes.size)
    return found


def _sort_(model: DynamicModel, often: Mapping[str, np.ndarray]) -> None:
    """Put the channels of every layer that gates decide on into the order of how often they are open, in place."""
    groups = find_groups(copy_of(model).unwrap(), model.input_size, model.exits)
    free = [group for group in groups if group.pinned is None and not group.coupled and not group.numbers]
    sortable = [(group, member) for group in free if (member := _gated(group, often)) is not None]
    orders = [np.argsort(-often[member.layer][member.channels].mean(1), kind="stable") for _, member in sortable]
    reorder_(model.backbone, [group for group, _ in sortable], orders)


def _gated(group: Group, often: Mapping[str, np.ndarray]) -> Member | None:
    """Of a group, a side on whose channels gates decide."""
    return next((member for member in group.members if member.role == "produces" and member.layer in often), None)


def _measure_norms_(model: DynamicModel, loader: Loader) -> None:
    """Let the batch norms of every width but the last see what they get, in place."""
    gates = model.gates
    assert isinstance(gates, Routers)
    sides = {site.layer: site.reads for site in gates.plan.sites}
    for width in range(len(gates.plan.regions[0].widths) - 1 if gates.plan.norms else 0):
        narrow = at_widths(model, [width] * len(gates.plan.regions))
        recalibrate_(narrow, loader)
        for name, number in gates.number.items():
            norm: Any = narrow.backbone.get_submodule(name)
            known = cast(WidthNorm, gates.norms[number])
            there = gates.narrow(sides.get(name), width)
            for mine, theirs in ((known.mean, norm.running_mean), (known.var, norm.running_var)):
                mine[width] = theirs if there is None else mine[width].index_copy(0, there.channels(), theirs)
