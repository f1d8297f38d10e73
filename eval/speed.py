"""What closed channels save in time: masked and sparse execution beside the folded dense backbone, and beside the same
backbone cut for good to equal widths, which no gate can beat.

    python -m eval.speed --model resnet50 --keep 0.5 --batch 1 16
    python -m eval.speed --model resnet50 --macs 0.45          # also pruned, and with nine weights in ten zero

Gates stand on a timm model with random weights, each unit open for the given share of random images, every image with a
mask of its own. All variants have their batch norms folded and take turns on the same input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from dynnet import DynamicModel, GateConfig, fold, prune, wrap
from dynnet.backbone.dry_run import trace
from dynnet.deploy.turns import take_turns
from dynnet.errors import DynnetError, GateError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.threads import fit_threads
from dynnet.gates.freezing import cut_frozen_
from dynnet.pruning import make_permanent_, sparsify_
from eval.programs import errors_told, timm_model, write_json

WARMUP = 3  # batches


@dataclass(frozen=True)
class Settings:
    """What is timed, and how; as for `main`."""

    model: str
    keep: float
    unit: int
    blocks: int
    batch: Sequence[int]
    calls: int
    channels_last: bool
    macs: float | None
    device: str | None


def main(
    model: str = "resnet50",
    keep: float = 0.5,
    unit: int = 8,
    blocks: int = 4,
    batch: Sequence[int] = (1, 16),
    calls: int = 30,
    channels_last: bool = True,
    macs: float | None = None,
    device: str | None = None,
    out: Path | None = None,
) -> None:
    """Time gated models.

    Args:
        model: timm's name.
        keep: share of the images for which a unit is open.
        unit: neighbouring channels that are switched together.
        blocks: blocks that one gate network decides on.
        batch: batch sizes, each timed apart.
        calls: timed calls of each variant, four times as many at batch size 1.
        channels_last: memory format.
        macs: also time the backbone pruned to this share of its MACs, the same share of every group's channels, and the
            backbone with 90% of its weights zero, which no dense kernel profits from.
        device: by default a GPU where there is one.
        out: also write the figures to this JSON file.
    """
    with errors_told():
        found = measure_speed(Settings(model, keep, unit, blocks, batch, calls, channels_last, macs, device))
    if out is not None:
        write_json(found, out)


def measure_speed(settings: Settings) -> list[dict[str, Any]]:
    """Print and return the figures.

    Raises:
        DynnetError: a share or a number that is none.
    """
    model, keep, batch, calls = settings.model, settings.keep, settings.batch, settings.calls
    if not 0 < keep <= 1 or min(calls, *batch) < 1:
        raise DynnetError(
            f"keep={keep:g}, calls={calls}, batch={list(batch)}: give a share in (0, 1], and numbers above 0"
        )
    keep_freed_memory()
    torch.manual_seed(0)
    gated, others, images = _models(settings)
    shares = _macs_shares(gated, others, images)
    assert gated.gates is not None
    under_gates = gated.gates.plan.macs_share
    print(
        f"{model}: {under_gates:.0%} of the MACs under gates, {shares['sparse']:.1%} run at keep {keep:g}", flush=True
    )
    found = []
    for size in batch:
        print(f"  batch {size}: {fit_threads(gated, gated.input_size, size)}", flush=True)
        times = compare(gated, others, images, size, calls * (4 if size == 1 else 1), settings.channels_last)
        for name, taken in times.items():
            ms, speedup = float(np.median(taken)), float(np.median(times["dense"] / taken))
            figures = {"ms": ms, "speedup": speedup, "macs_share": shares[name]}
            found.append({"model": model, "batch": size, "variant": name, **figures})
            print(f"  batch {size}, {name}, {shares[name]:.0%} of the MACs: {ms:.2f} ms, {speedup:.2f}x", flush=True)
    return found


def _models(settings: Settings) -> tuple[DynamicModel, dict[str, nn.Module], Tensor]:
    """The gated model, what is timed beside it by name, and (N, C, H, W) images for which its gates are set."""
    backbone = timm_model(settings.model)
    others = {} if settings.macs is None else static(backbone, settings.macs)
    gated = wrap(backbone, [], gates=GateConfig(settings.unit, settings.blocks))
    images = torch.randn(max(16, *settings.batch), *gated.input_size)
    open_share(gated, images, settings.keep)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gated = fold(gated).to(device)
    if (narrow := cut_to(gated, settings.keep)) is not None:
        others = {"cut for good": narrow, **others}
    for model in (gated, *others.values()):
        model.to(device)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
    return gated, others, images.to(device)


def _macs_shares(gated: DynamicModel, others: Mapping[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Of the dense backbone's MACs, by variant."""
    dense = gated.ledger().dense
    sparse = gated.predict(images).macs.double().mean().item() / dense
    executed = {name: trace(model, gated.input_size, 1).macs / dense for name, model in others.items()}
    return {"dense": 1.0, "masked": 1.0, "sparse": sparse, **executed}


def cut_to(model: DynamicModel, keep: float) -> nn.Module | None:
    """The bare backbone, cut for good to this share of every group's units; None where its norms cannot be cut."""
    assert model.gates is not None
    twin = copy.deepcopy(model)
    masks = []
    for region in model.gates.plan.regions:
        parts = [torch.randperm(units) < max(1, round(keep * units)) for units in region.groups]
        masks.append(torch.cat(parts))
    assert twin.gates is not None
    twin.gates.freeze(masks)
    backbone = twin.unwrap()
    try:
        cut_frozen_(backbone, twin.gates)
    except GateError as error:
        print(f"  not cut for good: {error}")
        return None
    return backbone


def static(backbone: nn.Module, macs: float) -> dict[str, nn.Module]:
    """The backbone pruned, and with most of its weights zero; both folded."""
    zeros = copy.deepcopy(backbone)
    sparsify_(zeros, 0.9)
    make_permanent_(zeros)
    pruned = prune(backbone, macs=macs, criterion="l1", scope="group")
    return {"pruned": fold(pruned), "90% zeros": fold(zeros)}


@torch.no_grad()
def open_share(model: DynamicModel, images: Tensor, keep: float) -> None:
    """Set the gates so that each unit is open for about this share of the images, one region after the other."""
    assert model.gates is not None
    network: Any
    for number, network in enumerate(model.gates.networks):
        logits = model.forward_exits(images).decisions.taken[number].logits  # type: ignore[union-attr]
        network.logits.bias -= logits.quantile(1 - keep, dim=0)


def compare(
    model: DynamicModel, others: Mapping[str, nn.Module], images: Tensor, size: int, calls: int, channels_last: bool
) -> dict[str, np.ndarray]:
    """Milliseconds of every call, by variant; they take turns."""

    def executed(how: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            model.execution = how
            return model(x)

        return run

    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": copy.deepcopy(model).unwrap(),
        "masked": executed("masked"),
        "sparse": executed("sparse"),
        **others,
    }

    def batches() -> Iterator[Tensor]:
        for i in range(calls + WARMUP):
            start = i * size % (len(images) - size + 1)
            x = images[start : start + size]
            yield x.contiguous(memory_format=torch.channels_last) if channels_last else x

    return take_turns(variants, batches(), WARMUP)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"batch"})
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes, each timed apart")
    main(**vars(parser.parse_args()))
