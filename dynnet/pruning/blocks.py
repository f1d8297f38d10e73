"""Whole residual blocks that a network can do without.

A block is *removable* where it gives what it is given, of the same shape, plus something: without it the network still
runs. How much each is needed is measured by leaving it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from dynnet.backbone.dry_run import BATCH, Call, Trace, trace
from dynnet.backbone.input_size import first_run, input_size_of
from dynnet.backbone.layers.table import effect_of
from dynnet.backbone.names import check_list, title
from dynnet.backbone.twin import copy_of
from dynnet.errors import ForwardError, NonFiniteError, PruneError, did_you_mean
from dynnet.pruning.bare import check_bare
from dynnet.pruning.shape import remove_

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Sensitivity:
    """What becomes of a model without one of its blocks.

    Attributes:
        block: its name.
        macs_share: of the model's MACs that run in the block.
        metric: of the model without it.
        drop: of the metric.
    """

    block: str
    macs_share: float
    metric: float
    drop: float


def removable_blocks(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> list[str]:
    """Names of the residual blocks that can be left out, the innermost ones, in running order.

    Args:
        model: takes (B, *input_size) images.
        input_size: (C, H, W); by default what the model was made for.

    Raises:
        PruneError: it does not run on such images.
    """
    size = input_size or input_size_of(model)
    with first_run(model, size, PruneError):
        seen = trace(model, size, BATCH)
    modules = dict(model.named_modules())
    names = [name for name, call in seen.once().items() if name and _is_residual(call, seen, modules)]
    # A stage that is one long sum is left to its blocks.
    names = [name for name in names if not any(other.startswith(name + ".") for other in names)]
    return [name for name in names if _runs_without(model, [name], size)]


def sensitivity(
    model: nn.Module,
    metric: Metric,
    blocks: Sequence[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> list[Sensitivity]:
    """Leave out one block after the other.

    Args:
        model: left as it was.
        metric: of a model, larger is better; an accuracy on held-out images, say.
        blocks: names; by default all that are removable.
        input_size: as in `removable_blocks`.

    Returns:
        One entry for each block, the least needed first.

    Raises:
        PruneError: nothing can be left out, or a block that cannot.
        NonFiniteError: a metric that is no number.
    """
    size = input_size or input_size_of(model)
    return _left_out(model, metric, _checked(model, blocks, size), size)


def remove_blocks(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """A copy in which some blocks pass on what they are given."""
    check_list("blocks", blocks, PruneError)
    modules = dict(model.named_modules())
    for block in blocks:
        if block not in modules:
            raise PruneError(f"{title(model)} has no module {block!r}{did_you_mean(block, modules)}")
    shorter = copy_of(model)
    for block in blocks:
        remove_(shorter, block)
    return shorter


def prune_layers(
    model: nn.Module, metric: Metric, macs: float, input_size: tuple[int, int, int] | None = None
) -> nn.Module:
    """A shorter copy of a model: the block whose loss hurts least goes, one after the other, measured anew each time.

    Args:
        model: left as it was.
        metric: as in `sensitivity`.
        macs: target, as a share of the model's.
        input_size: as in `removable_blocks`.

    Raises:
        PruneError: a wrapped model, a target outside (0, 1], or one that cannot be reached.
        NonFiniteError: a metric that is no number.
    """
    check_bare(model, masked=True)
    if not 0 < macs <= 1:
        raise PruneError(f"macs={macs}: give a share of the model's in (0, 1]")
    size = input_size or input_size_of(model)
    with first_run(model, size, PruneError):
        whole = trace(model, size, 1).macs
    shorter = copy_of(model)
    while (share := trace(shorter, size, 1).macs / whole) > macs:
        blocks = removable_blocks(shorter, size)
        if not blocks:
            raise PruneError(
                f"macs={macs:g} is out of reach for {title(model)}: without any of its blocks it is {share:.3f}"
            )
        remove_(shorter, _left_out(shorter, metric, blocks, size)[0].block)
    return shorter


def _left_out(model: nn.Module, metric: Metric, blocks: Sequence[str], size: tuple[int, int, int]) -> list[Sensitivity]:
    layers = trace(model, size, 1).layers
    whole = _finite(metric(model), "the model")
    found = []
    for block in tqdm(blocks, "blocks left out", leave=False, disable=None):
        left = _finite(metric(remove_blocks(model, [block])), f"the model without {block}")
        macs = sum(macs for name, macs in layers.items() if name == block or name.startswith(block + "."))
        found.append(Sensitivity(block, macs / sum(layers.values()), left, whole - left))
    return sorted(found, key=lambda s: s.drop)


def _finite(metric: float, of: str) -> float:
    if not math.isfinite(metric):
        raise NonFiniteError(f"the metric of {of} is {metric}; give one that is finite")
    return metric


def _checked(model: nn.Module, blocks: Sequence[str] | None, size: tuple[int, int, int]) -> list[str]:
    check_list("blocks", blocks or (), PruneError)
    known = removable_blocks(model, size)
    if blocks is None and not known:
        raise PruneError(f"{title(model)} has no residual blocks that can be left out")
    for block in blocks or ():
        if block not in known:
            raise PruneError(
                f"{block!r} is no residual block of {title(model)} that can be left out{did_you_mean(block, known)}; "
                f"choose from {', '.join(known) or 'none'}"
            )
    return known if blocks is None else list(blocks)


def _is_residual(call: Call, seen: Trace, modules: dict[str, nn.Module]) -> bool:
    """A tensor in, one of the same shape out; the input is read twice, once to work on it and once to add."""
    if 0 not in call.inputs or len(call.leaves) != 1:
        return False
    given = call.inputs[0]
    if given not in seen.lives or seen.lives[given].leaf.shape != call.leaves[0].shape:
        return False
    inside = [clock for clock, _ in seen.lives[given].readers if call.begin < clock <= call.end]
    # Channel attention reads twice as well; it works on what is pooled.
    works = any(
        effect_of(modules[other.name]) == "weighs" and math.prod(other.leaves[0].shape[2:]) > 1
        for other in seen.calls
        if other.name.startswith(call.name + ".") and other.leaves
    )
    return len(inside) > 1 and works


def _runs_without(model: nn.Module, blocks: Sequence[str], size: tuple[int, int, int]) -> bool:
    try:
        trace(remove_blocks(model, blocks), size, BATCH)
    except ForwardError:
        return False
    return True
