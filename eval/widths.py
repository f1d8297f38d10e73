"""What a few nested widths save in time: a model with untrained routers against its bare backbone, in one engine.

    python -m eval.widths --model resnet50 --exits maxpool layer1 layer2 layer3 --batch 1 16 32 --threads 2
    python -m eval.widths --model mobilenetv3_large_100 --batch 1 16
    python -m eval.widths --model resnet50 --exits maxpool layer1 layer2 layer3 --leave layer2   # where half leave

Random weights, and noise, which the routers are made to tell apart: all widths are used, about evenly. Both sides are
exported, folded, and take turns on the same images; the MACs saved are those of the images timed. With --engine null
both run in PyTorch. Also told is the size of all widths together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from dynnet import DynamicModel, GateConfig, export, fold, latency, wrap
from dynnet.backbone.chain import bare_of
from dynnet.deploy import Runner
from dynnet.errors import InputError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.threads import fit_threads
from dynnet.gates.plan import WIDTHS
from dynnet.gates.routers import Routers
from eval.programs import errors_told, timm_model, write_json
from eval.scenarios import half_at_each, ready

_IMAGES = 64
EXITS = (0.05, 0.3, 0.55, 0.8)  # where routers stand by default


def main(
    model: str = "resnet50",
    exits: Sequence[str] = (),
    widths: Sequence[float] = WIDTHS,
    unit: int = 16,
    batch: Sequence[int] = (1, 16),
    calls: int = 30,
    engine: str | None = "onnxruntime",
    threads: int | None = None,
    leave: str | None = None,
    json: Path | None = None,
) -> None:
    """Time widths.

    Args:
        model: timm's name.
        exits: where routers stand; by default at four places, spread over the MACs.
        widths: shares of the channels.
        unit: channels that go together.
        batch: batch sizes, each timed apart.
        calls: timed calls; at batch size 1 eight times as many.
        engine: in which both run; null for PyTorch.
        threads: by default as many as the layers can feed.
        leave: an exit at which half of the images leave.
        json: also write the figures to this file.
    """
    keep_freed_memory()
    with errors_told():
        torch.manual_seed(0)
        routed = _routed(model, list(exits) or list(EXITS), GateConfig(unit=unit, widths=tuple(widths)))
        images = torch.randn(_IMAGES, *routed.input_size)
        spread_(routed, images)
        if leave is not None:
            if leave not in routed.exits:
                raise InputError(f"no exit {leave!r} in {', '.join(routed.exits)}; give one of them")
            halves = half_at_each(routed, images)
            at = routed.exits.index(leave)
            routed.thresholds = [halves[at] if exit == at else float("inf") for exit in range(len(halves))]
        print(f"{model}: routers at {', '.join(routed.exits)}, widths {', '.join(map(str, widths))}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = _timed(routed, images, batch, calls, engine, threads, Path(folder))
        if json is not None:
            write_json({"model": model, "exits": list(routed.exits), "widths": list(widths), "timed": found}, json)


def _routed(name: str, exits: list[Any], config: GateConfig) -> DynamicModel:
    return wrap(timm_model(name), exits, gates=config)


def spread_(model: DynamicModel, images: Tensor) -> None:
    """Let untrained routers tell images apart, in place: each width is wanted by some."""
    gates = model.gates
    assert isinstance(gates, Routers)
    for number in range(len(gates.networks)):
        router: Any = gates.networks[number]
        nn.init.normal_(router.logits.weight, 0, 5.0)
        with torch.no_grad():
            decisions = model.forward_exits(images).decisions
            assert decisions is not None
            logits = decisions.taken[number].logits
            router.logits.weight /= logits.std(0)[:, None]
            router.logits.bias.copy_(-(logits - router.logits.bias).mean(0) / logits.std(0))


def _timed(
    model: DynamicModel,
    images: Tensor,
    sizes: Sequence[int],
    calls: int,
    engine: str | None,
    threads: int | None,
    folder: Path,
) -> list[dict[str, Any]]:
    found = []
    ours: Any
    theirs: Any
    if engine is not None:
        export(model, folder / "widths", engine=engine)
        export(bare_of(model), folder / "dense", engine=engine, input_size=model.input_size)
        weights = [sum(path.stat().st_size for path in (folder / name).iterdir()) for name in ("widths", "dense")]
        print(f"files of all widths: {weights[0] / 1e6:.1f} MB, of the dense one {weights[1] / 1e6:.1f} MB", flush=True)
    for size in sizes:
        told = fit_threads(model, model.input_size, size) if threads is None else f"{threads} threads"
        if threads is not None:
            torch.set_num_threads(threads)
        if engine is None:
            ours, theirs = ready(model), fold(bare_of(model), model.input_size).to(memory_format=torch.channels_last)
        else:
            ours, theirs = (Runner(folder / name, torch.get_num_threads()) for name in ("widths", "dense"))
        timed = latency(ours, images, against=theirs, batch_size=size, calls=calls * (8 if size == 1 else 1))
        macs = _macs(model, images)[timed.rows]
        share = float(macs.mean()) / model.ledger().dense
        gone = 1 - float(timed.dynamic_ms.sum() / timed.dense_ms.sum())
        row = {
            "batch_size": size,
            "macs_saved": 1 - share,
            "time_saved": gone,
            "time_by_macs": gone / (1 - share),
            **timed.summary(),
        }
        print(
            f"batch {size} ({told}): {timed.speedup:.2f} times as fast at {share:.1%} of the MACs; time saved "
            f"{gone:.1%}, {row['time_by_macs']:.2f} of the MACs saved",
            flush=True,
        )
        found.append(row)
    return found


def _macs(model: DynamicModel, images: Tensor) -> np.ndarray:
    """(M,) what each image costs."""
    return torch.cat([model.predict(part).macs for part in images.split(16)]).numpy()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"batch", "exits", "widths"})
    parser.add_argument("--exits", nargs="+", default=[], help="where routers stand; by default at four places")
    parser.add_argument("--widths", type=float, nargs="+", default=list(WIDTHS), help="shares of the channels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes, each timed apart")
    main(**vars(parser.parse_args()))
