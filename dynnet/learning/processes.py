"""One process or many: the same code, the same global batch, the same losses, the same table.

Start many with `torchrun --nproc-per-node 2 -m training.train ...`; gloo on CPU, NCCL on GPUs. N rows
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn

Found = TypeVar("Found")


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Is this the process that writes files and speaks?"""
        return self.rank == 0

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all processes."""
        return nn.parallel.DistributedDataParallel(module) if self.size > 1 else module

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, on all of them."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over all processes; gradients flow to all of them."""
        return cast(Tensor, dist_nn.all_reduce(x)) / self.size if self.size > 1 else x

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process does what follows before the others begin: it fills caches that they then find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def gathered(self, found: Found, rows: np.ndarray) -> Found:
        """What all processes have found, each of its own rows, on all of them and in the order of the rows.

        Args:
            found: an array (N, ...), a tuple of some, or a dataclass in which arrays are such.
            rows: (N,) whose they are.
        """
        if self.size == 1:
            return found
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, (found, rows))
        order = np.argsort(np.concatenate([rows for _, rows in parts]))
        return cast(Found, _joined([part for part, _ in parts], order))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World(0, 1, torch.device("cpu"))


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started, or be alone."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        yield dataclasses.replace(ALONE, device=torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # The first process evaluates and writes alone at the end, which may take longer than the default ten minutes.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _joined(parts: Sequence[Any], order: np.ndarray) -> Any:
    """Arrays put together wherever they are; all else is the same in all parts."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)[order]
    if isinstance(first, tuple) and first and isinstance(first[0], np.ndarray):
        return tuple(_joined(column, order) for column in zip(*parts, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(first, **{n: _joined([getattr(part, n) for part in parts], order) for n in names})
    return first
