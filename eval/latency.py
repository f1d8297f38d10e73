"""Latency of a run, or of any timm model with untrained exits, beside its bare backbone.

    python -m eval.latency --run runs/digits --samples 700 --batch 1 16
    python -m eval.latency --model resnet50 --batch 1 16
    python -m eval.latency --model resnet50 --batch 1 16 --engine onnxruntime

Of a run: real test images, fitted thresholds. Of a model: what exits cost when nobody leaves, and what they save when
half of a batch or all of it leaves at an exit, against the MACs saved. Both models take turns on the same input, both
as PyTorch runs them, or both exported and in the same engine. (eval.deploy also verifies what was exported.)
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from dynnet import DynamicModel, fold, latency
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.threads import fit_threads
from eval.exported import Exported
from eval.programs import errors_told, write_json
from eval.runs import Run, open_run, test_images
from eval.savings import in_words, percentiles, savings
from eval.scenarios import random_images, ready, scenarios, untrained


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
    engine: str | None = None,
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
        folded: batch norms of both models folded into their convolutions, as in an engine they always are.
        device: by default a GPU where there is one.
        engine: export both models and time them there, in as many threads as PyTorch would have: "onnxruntime", for
            example. By default they are not exported, and run eagerly in PyTorch.
        out: also write the figures to this JSON file.
    """
    if (run is None) == (model is None):
        print("error: give either --run, a finished run, or --model, a name of timm's", file=sys.stderr)
        raise SystemExit(2)
    keep_freed_memory()
    with errors_told():
        if run is not None:
            found = _of_run(open_run(run, data, device), samples, batch, folded, engine)
        else:
            where = device or ("cuda" if torch.cuda.is_available() else "cpu")
            timed = ready(untrained(str(model), exits), channels_last, folded, where)
            found = _of_model(str(model), timed, batch, calls, engine)
    if out is not None:
        write_json(found, out)


def _of_run(run: Run, samples: int, batch: Sequence[int], folded: bool, engine: str | None) -> list[dict[str, Any]]:
    _, pictures = test_images(run.data, samples)
    model = fold(run.model) if folded else run.model
    found = []
    with _exported(model, engine) as exported:
        for size in batch:
            print(f"batch {size}: {fit_threads(model, run.data.input_size, size)}", flush=True)
            timed = latency(**_sides(model, exported), images=pictures, batch_size=size)
            found.append(timed.summary())
            print(
                f"batch {size}: {percentiles(timed)}; speed-up {timed.speedup:.2f}x over {len(timed.dense_ms)} calls",
                flush=True,
            )
            if size == 1:
                for exit, (n, ms) in timed.by_exit().items():
                    name = run.model.exits[exit] if exit < len(run.model.exits) else "end"
                    print(f"  {name}: {n} images, median {ms:.3f} ms")
    return found


def _of_model(
    name: str, model: DynamicModel, batch: Sequence[int], calls: int, engine: str | None
) -> list[dict[str, Any]]:
    found = []
    ledger = model.ledger()
    with _exported(model, engine) as exported:
        for size in batch:
            print(f"{name}, batch {size}: {fit_threads(model, model.input_size, size)}", flush=True)
            images = random_images(model, size)
            for scenario, thresholds in scenarios(model, images).items():
                model.thresholds = thresholds
                timed = latency(
                    **_sides(model, exported),
                    images=images[:size] if size > 1 else images,
                    batch_size=size,
                    calls=calls * (4 if size == 1 else 1),
                    warmup=4,
                )
                saved = savings(timed, ledger.bill(model.running).tolist(), ledger.dense)
                found.append({"model": name, "scenario": scenario, **saved, **timed.summary()})
                print(f"{name}, batch {size}, {scenario}: {percentiles(timed)}; {in_words(saved)}", flush=True)
    return found


@contextlib.contextmanager
def _exported(model: DynamicModel, engine: str | None) -> Iterator[Exported | None]:
    if engine is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Exported(model, engine, folder)


def _sides(model: DynamicModel, exported: Exported | None) -> dict[str, Any]:
    """What is timed at the model's present thresholds: eagerly, or in an engine."""
    return {"model": model} if exported is None else {"model": exported.dynamic(), "against": exported.dense()}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"batch"})
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes, each timed apart")
    main(**vars(parser.parse_args()))
