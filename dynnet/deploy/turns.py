"""Models timed in turns, in PyTorch or in an engine: whatever else the machine does hits all alike. N timed calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynnet.deploy.runner import Runner


@torch.no_grad()
def take_turns(
    runs: Mapping[str, Callable[[Tensor], Any] | Runner], batches: Iterable[Tensor], warmup: int = 3
) -> dict[str, np.ndarray]:
    """Time several models on the same batches, each batch through all of them, so that whatever else the machine does
    hits all alike.

    Args:
        runs: by name; runners get numpy arrays, made outside of the clock.
        batches: on the models' device.
        warmup: batches at the beginning that do not count.

    Returns:
        By name, milliseconds (N,) of every call.
    """
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i, batch in enumerate(batches):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _timed(runs[name], batch)
            if i >= warmup:
                found[name].append(elapsed)
    return {name: np.array(times) for name, times in found.items()}


def as_array(batch: Tensor) -> np.ndarray:
    """As runners take it."""
    return batch.cpu().contiguous().numpy()


def _timed(run: Callable[[Tensor], Any] | Runner, batch: Tensor) -> float:
    call: Callable[[Any], Any] = run.predict if isinstance(run, Runner) else run
    given = as_array(batch) if isinstance(run, Runner) else batch
    _synchronise(batch.device)
    began = time.perf_counter()
    call(given)
    _synchronise(batch.device)
    return (time.perf_counter() - began) * 1e3


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
