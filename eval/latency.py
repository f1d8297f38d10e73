"""Latency of a run, or of any timm model with untrained exits, beside its bare backbone.

    python -m eval.latency --run runs/digits --samples 700 --batch 1 16
    python -m eval.latency --model resnet50 --batch 1 16

Of a run: real test images, fitted thresholds. Of a model: what exits cost when nobody leaves, and what they save when
half of a batch or all of it leaves at an exit, against the MACs saved. Both models take turns on the same input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from dynnet import DynamicModel, fold, latency, wrap
from dynnet.backbone.modes import device_of
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.threads import fit_threads
from dynnet.evaluation.timing import Latency
from eval.programs import errors_told, timm_model, write_json
from eval.runs import Run, open_run, test_images


def main(
    run: Path | None = None,
    model: str | None = None,
    exits: int = 2,
    data: str | None = None,
    samples: int = 300,
    batch: Sequence[int] = (1,),
    calls: int = 30,
    channels_last: bool = True,
    folded: bool = True,
    device: str | None = None,
    out: Path | None = None,
) -> None:
    """Time a dynamic model against its bare backbone.

    Args:
        run: folder of a finished run.
        model: in place of a run, timm's name of a model, with random weights and images.
        exits: number of exits of `model`.
        data: folder of the dataset, where it is not the recipe's.
        samples: test images of a run to time; p99 needs 662 calls.
        batch: batch sizes, each timed apart.
        calls: timed calls a scenario of `model`, four times as many at batch size 1.
        channels_last: memory format of `model`.
        folded: batch norms of both models folded into their convolutions.
        device: by default a GPU where there is one.
        out: also write the figures to this JSON file.
    """
    if (run is None) == (model is None):
        print("error: give either --run, a finished run, or --model, a name of timm's", file=sys.stderr)
        raise SystemExit(2)
    keep_freed_memory()
    with errors_told():
        found = (
            _of_run(open_run(run, data, device), samples, batch, folded)
            if run
            else _of_model(str(model), _untrained(str(model), exits, channels_last, folded, device), batch, calls)
        )
    if out is not None:
        write_json(found, out)


def _of_run(run: Run, samples: int, batch: Sequence[int], folded: bool) -> list[dict[str, Any]]:
    _, pictures = test_images(run.data, samples)
    model = fold(run.model) if folded else run.model
    found = []
    for size in batch:
        print(f"batch {size}: {fit_threads(model, run.data.input_size, size)}", flush=True)
        timed = latency(model, pictures, batch_size=size)
        found.append(timed.summary())
        print(
            f"batch {size}: {_percentiles(timed)}; speed-up {timed.speedup:.2f}x over {len(timed.dense_ms)} calls",
            flush=True,
        )
        if size == 1:
            for exit, (n, ms) in timed.by_exit().items():
                name = run.model.exits[exit] if exit < len(run.model.exits) else "end"
                print(f"  {name}: {n} images, median {ms:.3f} ms")
    return found


def _untrained(name: str, exits: int, channels_last: bool, folded: bool, device: str | None) -> DynamicModel:
    """A model of timm's with random weights and this many exits, ready to be timed."""
    torch.manual_seed(0)
    model = wrap(timm_model(name), exits)
    if folded:
        model = fold(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _of_model(name: str, model: DynamicModel, batch: Sequence[int], calls: int) -> list[dict[str, Any]]:
    found = []
    for size in batch:
        print(f"{name}, batch {size}: {fit_threads(model, model.input_size, size)}", flush=True)
        images = torch.randn(max(16, size), *model.input_size)
        for scenario, thresholds in _scenarios(model, images).items():
            model.thresholds = thresholds
            timed = latency(
                model,
                images[:size] if size > 1 else images,
                batch_size=size,
                calls=calls * (4 if size == 1 else 1),
                warmup=4,
            )
            saved = {"macs_saved": _macs_saved(model, timed), "time_saved": _time_saved(timed)}
            found.append({"model": name, "scenario": scenario, **saved, **timed.summary()})
            print(f"{name}, batch {size}, {scenario}: {_percentiles(timed)}; {_told(**saved)}", flush=True)
    return found


def _scenarios(model: DynamicModel, images: Tensor) -> dict[str, list[float]]:
    """Thresholds by name. The heads of untrained exits answer at random, but what they cost is real."""
    off = float("inf")
    with torch.no_grad():
        logits = model.forward_exits(images.to(device_of(model))).logits
    count = len(model.exits)
    found = {"nobody leaves": [2.0] * count}
    for i, name in enumerate(model.exits):
        others = [off] * count
        confidence = model.measure(logits[i], None)[0].double().sort().values
        half = len(confidence) // 2
        found[f"half leaves at {name}"] = [*others[:i], float(confidence[half - 1 : half + 1].mean()), *others[i + 1 :]]
        found[f"all leave at {name}"] = [*others[:i], -off, *others[i + 1 :]]
    return found


def _macs_saved(model: DynamicModel, timed: Latency) -> float:
    ledger = model.ledger()
    bill = ledger.bill(model.running).numpy()
    return 1 - float(bill[timed.exits].mean()) / ledger.dense


def _time_saved(timed: Latency) -> float:
    """Of a typical call: medians of the paired ratios by exit taken, weighed by how many took it."""
    ratio = timed.dynamic_ms / timed.dense_ms
    if timed.batch_size > 1:
        return 1 - float(np.median(ratio))
    taken = timed.exits[:, 0]
    return 1 - sum(float((taken == e).mean() * np.median(ratio[taken == e])) for e in np.unique(taken))


def _told(macs_saved: float, time_saved: float) -> str:
    ratio = f", {time_saved / macs_saved:.2f} of the MACs saved" if macs_saved > 0.05 else ""
    return f"MACs saved {macs_saved:+.1%}, time saved {time_saved:+.1%}{ratio}"


def _percentiles(timed: Latency) -> str:
    parts = []
    for which in (50, 90, 99):
        dense, dynamic = timed.percentile(which)
        parts.append(f"p{which} {dynamic:.2f} ms (bare {dense:.2f})")
    return ", ".join(parts)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"batch"})
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes, each timed apart")
    main(**vars(parser.parse_args()))
