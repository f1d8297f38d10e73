"""A dense model, and what pruning has made of it: accuracy, compute, size and time of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynnet.backbone.dry_run import trace
from dynnet.backbone.modes import device_of
from dynnet.deploy import Runner, engines
from dynnet.deploy.folding import fold
from dynnet.evaluation.threads import fit_threads
from dynnet.evaluation.timing import in_engine, one_at_a_time
from dynnet.learning.data import Data
from dynnet.thresholds.answers import named_right

TIMED = 200  # images, one at a time
BATCH = 256  # of the evaluation


def compare(
    models: Mapping[str, nn.Module], paths: Mapping[str, Path], data: Data, small: Path | None = None
) -> dict[str, Any]:
    """Measure on the test split, which nothing was chosen by.

    Args:
        models: "dense" and "pruned", in eval mode.
        paths: of their files.
        data: the splits.
        small: folder of the pruned one, exported in int8.

    Returns:
        By name, with "int8" where there is one: "accuracy", "macs" of one image, "flops", "parameters", "sparsity",
        "size_bytes" and "p50_ms", one image at a time; for all but the dense one also "compression" of the file,
        "accuracy_retention" and "speedup", a median of ratios. And "engine", in which all were timed: that of the int8
        stages, or PyTorch.
    """
    dense, size = models["dense"], data.input_size
    print(f"timed one image at a time: {fit_threads(dense, size, 1)}", flush=True)
    runner = None if small is None else Runner(small, torch.get_num_threads())
    times = _times(models, data, runner)
    print(f"evaluation: {fit_threads(dense, size, BATCH)}", flush=True)
    found: dict[str, Any] = {}
    for name, model in models.items():
        macs = trace(model, size, 1).macs
        found[name] = {
            "accuracy": accuracy(model, data, "test"),
            "macs": macs,
            "flops": 2 * macs,
            "parameters": sum(p.numel() for p in model.parameters()),
            "sparsity": _zeros(model),
            "size_bytes": paths[name].stat().st_size,
        }
    if runner is not None and small is not None:
        weight = sum((small / part.file).stat().st_size for part in runner.manifest.stages)
        found["int8"] = {**found["pruned"], "accuracy": _accuracy_of(runner, data), "size_bytes": weight}
    before = found["dense"]
    for name, after in found.items():
        after["p50_ms"] = float(np.median(times[name]))
        if name != "dense":
            after["compression"] = before["size_bytes"] / after["size_bytes"]
            after["accuracy_retention"] = after["accuracy"] / before["accuracy"]
            after["speedup"] = float(np.median(times["dense"] / times[name]))
    engine = f"PyTorch {torch.__version__}" if runner is None else engines.named(runner.manifest.engine)
    return {**found, "engine": engine}


def accuracy(model: nn.Module, data: Data, split: Any) -> float:
    """The share of a split's images that a model names right."""
    return float(named_right(model, data.loader(split, BATCH)).mean())


def _accuracy_of(runner: Runner, data: Data) -> float:
    right = []
    for images, labels, *_ in data.loader("test", BATCH):
        right.append(runner.predict(images.numpy()).logits.argmax(1) == labels.numpy())
    return float(np.concatenate(right).mean())


def table(results: Mapping[str, Any]) -> str:
    """What `compare` found, in a few lines."""
    lines = [f"{'':8}{'accuracy':>9}{'MACs':>10}{'parameters':>12}{'zeros':>8}{'size':>10}{'batch-1 p50':>13}"]
    names = [name for name in ("dense", "pruned", "int8") if name in results]
    for name in names:
        r = results[name]
        lines.append(
            f"{name:8}{r['accuracy']:9.2%}{r['macs'] / 1e6:8.2f} M{r['parameters'] / 1e6:10.3f} M{r['sparsity']:8.1%}"
            f"{r['size_bytes'] / 1e6:7.2f} MB{r['p50_ms']:10.2f} ms"
        )
    for name in names[1:]:
        r = results[name]
        lines.append(
            f"{name}: {r['accuracy_retention']:.1%} of the accuracy kept, file {r['compression']:.2f}x smaller, "
            f"{r['speedup']:.2f}x as fast one image at a time, in {results['engine']}"
        )
    return "\n".join(lines)


def _times(models: Mapping[str, nn.Module], data: Data, small: Runner | None) -> dict[str, np.ndarray]:
    """Milliseconds of every call, by model; batch norms are folded, and all take turns on the same images, in the
    engine that runs the int8 stages, if there are such."""
    images = next(iter(data.loader("test", TIMED))).images
    if small is None:
        device = device_of(models["dense"])
        return one_at_a_time({name: fold(model, data.input_size).to(device) for name, model in models.items()}, images)
    with in_engine({**models, "int8": small}, small.manifest.engine, data.input_size) as runs:
        return one_at_a_time(runs, images)


def _zeros(model: nn.Module) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
