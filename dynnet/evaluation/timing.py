"""The timing protocol.

One sample at a time, on real inputs in shuffled order, the exit test included; the bare backbone and the dynamic model
take turns on the same input in the same process, so that whatever else the machine does hits both alike. Medians and
tails are reported, never means alone. Other batch sizes are timed apart. In an engine, both are exported and run there.

    N timed calls, B batch
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from dynnet.backbone.chain import bare_of
from dynnet.backbone.modes import device_of, evaluating
from dynnet.deploy import engines
from dynnet.deploy.exporting import export
from dynnet.deploy.folding import folded_norms
from dynnet.deploy.runner import Runner
from dynnet.deploy.turns import as_array, take_turns
from dynnet.errors import InputError
from dynnet.model import DynamicModel

# Samples that a percentile needs for its estimate to be an upper bound with 99% confidence in rank statistics.
NEEDED = {50: 1, 90: 64, 99: 662}

Timed = nn.Module | Runner


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the same inputs through both models.

    Attributes:
        batch_size: B of every call.
        rows: (N, B) int64, the timed images.
        exits: (N, B) int64, where each left.
        dense_ms: (N,) of the bare backbone.
        dynamic_ms: (N,) of the dynamic model.
        setting: device, threads, dtype, memory format, and whether batch norms are folded; of runners the engine and
            its version, threads and dtype.
    """

    batch_size: int
    rows: np.ndarray
    exits: np.ndarray
    dense_ms: np.ndarray
    dynamic_ms: np.ndarray
    setting: dict[str, Any]

    def percentile(self, which: int) -> tuple[float, float]:
        """(dense, dynamic) milliseconds."""
        return float(np.percentile(self.dense_ms, which)), float(np.percentile(self.dynamic_ms, which))

    @property
    def speedup(self) -> float:
        """Total time of the bare backbone over that of the dynamic model, on the same inputs."""
        return float(self.dense_ms.sum() / self.dynamic_ms.sum())

    def by_exit(self) -> dict[int, tuple[int, float]]:
        """Per exit taken: (calls, median milliseconds); at batch size 1 only."""
        if self.batch_size != 1:
            raise InputError(f"latency by exit needs batch size 1, this was taken at {self.batch_size}")
        taken = self.exits[:, 0]
        return {
            int(e): (int((taken == e).sum()), float(np.median(self.dynamic_ms[taken == e]))) for e in np.unique(taken)
        }

    def __str__(self) -> str:
        (dense, dynamic), (dense90, dynamic90) = self.percentile(50), self.percentile(90)
        where = ", ".join(f"{key} {value}" for key, value in self.setting.items())
        return (
            f"{len(self.dense_ms)} calls of {self.batch_size} images: p50 {dynamic:.2f} ms (bare {dense:.2f}), p90 "
            f"{dynamic90:.2f} ms (bare {dense90:.2f}), {self.speedup:.2f} times as fast in total\n{where}"
        )

    def summary(self) -> dict[str, Any]:
        """Everything worth quoting, as plain numbers."""
        names = {50: "p50", 90: "p90", 99: "p99"}
        return {
            "batch_size": self.batch_size,
            "calls": len(self.dense_ms),
            "dense_ms": {names[q]: self.percentile(q)[0] for q in NEEDED},
            "dynamic_ms": {names[q]: self.percentile(q)[1] for q in NEEDED},
            "median_ratio": float(np.median(self.dynamic_ms / self.dense_ms)),
            "speedup": self.speedup,
            "uncertain": [names[q] for q, n in NEEDED.items() if len(self.dense_ms) < n],
            "setting": self.setting,
        }


@torch.no_grad()
def latency(
    model: Timed,
    images: Tensor,
    *,
    against: Timed | None = None,
    batch_size: int = 1,
    calls: int | None = None,
    warmup: int = 10,
    seed: int = 0,
    engine: str | None = None,
) -> Latency:
    """Time a dynamic model against its bare backbone, or any model against another.

    >>> import torch, dynnet
    >>> model = dynnet.create_model("digits")
    >>> timed = latency(dynnet.fold(model), torch.zeros(8, 1, 8, 8))
    >>> timed.dense_ms.shape, timed.dynamic_ms.shape
    ((8,), (8,))

    Args:
        model: wrapped, with thresholds set; or a plain one, with another to be timed against. It is put into eval mode
            for the time. Or a runner of exported stages.
        images: (M, C, H, W) real inputs, normalised.
        against: the model that is called dense in the result, as it runs; by default the bare backbone of `model`.
        batch_size: B of every call.
        calls: N; by default each image is used once.
        warmup: calls of both models before the clock counts.
        seed: of the order of the images.
        engine: export both, as `dynnet.export` does, into a folder for the time, and run them there, in as many threads
            as PyTorch has; by default they run as they are.

    Raises:
        InputError: fewer images than one batch, or a plain model or a runner with nothing to compare it with.
        ExportError: one of them cannot be exported, or the engine is not installed.
    """
    if against is None and not isinstance(model, DynamicModel):
        kind = "runner" if isinstance(model, Runner) else "plain model"
        raise InputError(f"a {kind} has no bare backbone to be compared with; give against=, another model")
    if len(images) < batch_size or batch_size < 1:
        raise InputError(f"got {len(images)} images for batches of {batch_size}; give at least one batch")
    dense = _bare(model) if against is None else against
    count = calls or len(images) // batch_size
    order = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        [torch.randperm(len(images), generator=order) for _ in range(math.ceil(count * batch_size / len(images)))]
    )[: count * batch_size].view(count, batch_size)
    exits: list[np.ndarray] = []

    def batches(runs: Mapping[str, Timed]) -> Iterator[Tensor]:
        modules = [run for run in runs.values() if isinstance(run, nn.Module)]
        for i in range(-warmup, count):
            batch = images[rows[i % count]]
            if modules:
                batch = batch.to(device_of(modules[-1])).contiguous(memory_format=memory_format(modules[-1]))
            yield batch
            if i >= 0:
                exits.append(_exits(runs["dynamic"], batch))

    with contextlib.ExitStack() as stack:
        runs: dict[str, Timed] = {"dense": dense, "dynamic": model}
        if engine is not None:
            runs = stack.enter_context(in_engine(runs, engine, cast(tuple[int, int, int], tuple(images.shape[1:]))))
        for run in runs.values():
            if isinstance(run, nn.Module):
                stack.enter_context(evaluating(run))
        times = take_turns(runs, batches(runs), warmup)
    return Latency(
        batch_size, rows.numpy(), np.stack(exits), times["dense"], times["dynamic"], _setting(runs["dynamic"])
    )


@contextlib.contextmanager
def in_engine(
    models: Mapping[str, Timed],
    engine: str,
    input_size: tuple[int, int, int],
    exits: Literal["running", "all"] = "running",
) -> Iterator[dict[str, Timed]]:
    """Runners of models, exported into a folder for the time, in as many threads as PyTorch has.

    Args:
        models: by name; those that are runners already stay.
        engine: as for `dynnet.export`.
        input_size: (C, H, W) of plain models' images.
        exits: as for `dynnet.export`.

    Raises:
        ExportError: one of them cannot be exported, or the engine is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Timed] = {}
        for number, (name, model) in enumerate(models.items()):
            if isinstance(model, nn.Module):
                export(model, f"{folder}/{number}", engine=engine, exits=exits, input_size=input_size)
                model = Runner(f"{folder}/{number}", torch.get_num_threads())
            found[name] = model
        yield found


def one_at_a_time(models: Mapping[str, Timed], images: Tensor, warmup: int = 10) -> dict[str, np.ndarray]:
    """Time several models on single images, as `take_turns` does.

    Args:
        models: by name, as they run; modules on one device, of which weights are laid out as those of the first, in
            place.
        images: (N, C, H, W).
        warmup: images that are run before any of them counts.

    Returns:
        By name, milliseconds (N,).
    """
    singles = list(images.split(1))
    if modules := [model for model in models.values() if isinstance(model, nn.Module)]:
        layout, device = memory_format(modules[0]), device_of(modules[0])
        for module in modules:
            module.to(memory_format=layout)
        singles = [single.to(device).contiguous(memory_format=layout) for single in singles]
    warm = [singles[i % len(singles)] for i in range(warmup)]
    return take_turns(models, warm + singles, warmup)


def _bare(model: Timed) -> nn.Module:
    """A copy of the backbone without hooks."""
    assert isinstance(model, DynamicModel)
    return bare_of(model)


def _exits(model: Timed, batch: Tensor) -> np.ndarray:
    """(B,) where each image leaves; a plain model has one exit, its own head."""
    if isinstance(model, Runner):
        return model.predict(as_array(batch)).exit
    if isinstance(model, DynamicModel):
        return model.predict(batch).exit.cpu().numpy()
    return np.zeros(len(batch), dtype=np.int64)


def _setting(model: Timed) -> dict[str, Any]:
    if isinstance(model, Runner):
        told = {"engine": engines.named(model.manifest.engine), "threads": model.threads or "one a processor"}
        return {**told, "dtype": model.manifest.dtype, "folded": True}
    device = device_of(model)
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch."),
        "channels_last": memory_format(model) is torch.channels_last,
        "folded": bool(folded_norms(model)),
    }


def memory_format(model: nn.Module) -> torch.memory_format:
    """In which a model's weights are, and its images should be."""
    backbone = model.backbone if isinstance(model, DynamicModel) else model
    for weight in backbone.parameters():
        # A kernel of one pixel or one channel is contiguous in both formats and tells nothing.
        if weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2] * weight.shape[3] > 1:
            last = weight.is_contiguous(memory_format=torch.channels_last)
            return torch.channels_last if last else torch.contiguous_format
    return torch.contiguous_format
