"""What is saved in time on a GPU: dense, pruned, exits, widths, and 2:4 sparsity, in PyTorch and in an engine there.

    python -m eval.gpu --out runs/gpu.json
    python -m eval.gpu --model cifar_resnet20 --sparse null --batch 1 4 --device cpu    # a try without a GPU

Random weights and noise: half of the images leave at the first of two exits, four widths are used about evenly, and
what is pruned keeps 45% of the MACs in multiples of 16 channels. All sides take turns on the same images, means count;
batch norms are folded. In the engine "torch" every stage is compiled. 2:4 sparsity is timed in half precision, on
linear layers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from dynnet import DynamicModel, GateConfig, export, fold, prune, wrap
from dynnet.backbone.dry_run import trace
from dynnet.backbone.input_size import input_size_of
from dynnet.deploy import Runner
from dynnet.deploy.turns import take_turns
from dynnet.errors import InputError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.gates.plan import WIDTHS
from dynnet.pruning import make_permanent_, sparsify_n_m_, to_semi_structured_
from eval.programs import errors_told, timm_model, write_json
from eval.scenarios import half_at_each, ready, untrained
from eval.widths import EXITS, spread_

_KEPT, _MULTIPLE = 0.45, 16

Row = dict[str, Any]


def main(
    model: str = "resnet50",
    sparse: str | None = "vit_base_patch16_224",
    batch: Sequence[int] = (1, 16, 256),
    calls: int = 30,
    engine: str | None = "torch",
    device: str = "cuda",
    out: Path | None = None,
) -> None:
    """Time what dynnet makes of models of timm's.

    Args:
        model: timm's name.
        sparse: timm's name of a model for 2:4 sparsity; null leaves that out.
        batch: batch sizes, each timed apart.
        calls: timed calls of each.
        engine: in which all are timed too, exported; null for none.
        device: where.
        out: a JSON file for the figures.
    """
    with errors_told():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError("no GPU of PyTorch's here; --device cpu tries the program on smaller models")
        keep_freed_memory()
        torch.backends.cudnn.benchmark = True
        named = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
        print(f"{named}, PyTorch {torch.__version__}", flush=True)
        images = torch.randn(max(64, *batch), *input_size_of(timm_model(model)), device=device)
        sides = _sides(model, images)
        macs = {name: _macs(side, images) for name, side in sides.items()}
        shares = {name: spent / macs["dense"] for name, spent in macs.items()}
        rows = []
        for where, runs in _places(sides, engine):
            rows += list(_timed(model, where, runs, shares, images, batch, calls))
        if sparse is not None:
            rows += list(_two_of_four(sparse, device, batch, calls))
        if out is not None:
            write_json({"device": named, "torch": torch.__version__, "rows": rows}, out)


def _sides(name: str, images: Tensor) -> dict[str, nn.Module]:
    """What is timed, by name, in eval mode and folded."""
    device = str(images.device)
    exits = ready(untrained(name, 2), device=device)
    exits.thresholds = [half_at_each(exits, images)[0], float("inf")]
    widths = ready(wrap(timm_model(name), EXITS, gates=GateConfig(unit=_MULTIPLE, widths=WIDTHS)), device=device)
    spread_(widths, images)
    backbone = timm_model(name)
    slim = prune(backbone, macs=_KEPT, criterion="l2", multiple=_MULTIPLE)
    plain = {"dense": backbone, f"pruned to {_KEPT:.0%}": slim}
    bare = {which: fold(model).to(device).to(memory_format=torch.channels_last) for which, model in plain.items()}
    return {**bare, "exits, half leave at the first": exits, "four widths": widths}


def _macs(side: nn.Module, images: Tensor) -> float:
    """Of an image, in the mean."""
    if isinstance(side, DynamicModel):
        return float(side.predict(images[:64]).macs.double().mean())
    return trace(side, tuple(images.shape[1:]), 1).macs


def _places(sides: Mapping[str, nn.Module], engine: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where all run, and what is called there."""
    yield "eager", {name: side.predict if isinstance(side, DynamicModel) else side for name, side in sides.items()}
    if engine is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for number, (name, side) in enumerate(sides.items()):
            where = Path(folder) / str(number)
            export(side, where, engine=engine)
            runners[name] = Runner(where, torch.get_num_threads())
        yield engine, runners


def _timed(
    model: str,
    where: str,
    runs: Mapping[str, Callable[[Tensor], Any] | Runner],
    shares: Mapping[str, float],
    images: Tensor,
    sizes: Sequence[int],
    calls: int,
) -> Iterator[Row]:
    """A row for each of them at each batch size."""
    for size in sizes:
        order = torch.randperm(len(images), device=images.device)
        starts = [torch.arange(size, device=images.device) + size * number for number in range(calls + 5)]
        batches = (images[order[rows % len(images)]] for rows in starts)
        times = take_turns(runs, batches, warmup=5)
        for name, taken in times.items():
            faster = float(times["dense"].mean() / taken.mean())
            share = shares[name]
            row = {"model": model, "where": where, "batch": size, "side": name, "macs_share": share}
            print(
                f"{model}, {where}, batch {size}, {name}: {taken.mean():.2f} ms, {faster:.2f} times as fast at "
                f"{share:.0%} of the MACs",
                flush=True,
            )
            yield {**row, "ms": float(taken.mean()), "faster": faster}


@torch.no_grad()
def _two_of_four(name: str, device: str, sizes: Sequence[int], calls: int) -> Iterator[Row]:
    """A model whose linear layers are 2:4, as it is and with the layers converted that sparse cores take."""
    dense = timm_model(name)
    size = input_size_of(dense)
    sparsify_n_m_(dense)
    make_permanent_(dense)
    dense = dense.to(device, torch.half)
    converted = copy.deepcopy(dense)
    layers = to_semi_structured_(converted)
    print(f"{name}, 2:4: {len(layers)} layers converted", flush=True)
    images = torch.randn(max(16, *sizes), *size, device=device, dtype=torch.half)
    shares = {"dense": 1.0, "2:4": 1.0}
    yield from _timed(name, "eager, half", {"dense": dense, "2:4": converted}, shares, images, sizes, calls)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"batch"})
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 256], help="batch sizes, each timed apart")
    main(**vars(parser.parse_args()))
