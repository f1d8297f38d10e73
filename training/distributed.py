"""One process or many: the same code, the same global batch, the same losses.

Start many with `torchrun --nproc-per-node 2 -m training.train ...`; gloo on CPU, NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


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

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started, or be alone."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, torch.device("cuda" if cuda else "cpu"))
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


class SyncedBatchNorm(TorchFunctionMode):
    """While active, batch norms in train mode take their statistics over all processes.

    torch's SyncBatchNorm refuses CPU tensors and has to replace modules; this works on the function that every batch
    norm calls (timm's BatchNormAct2d too), on any device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        with torch._C.DisableTorchFunction():
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = [d for d in range(x.ndim) if d != 1]
    wide = x if x.dtype == torch.float64 else x.float()
    shape = [1, -1] + [1] * (x.ndim - 2)
    count = torch.tensor([float(x.numel() // x.shape[1])], device=x.device)
    *sums, total = dist_nn.all_reduce(torch.cat([wide.sum(dims), count])).split([x.shape[1], 1])
    mean = sums[0] / total
    # Two passes: the mean of squares minus the square of the mean would lose digits.
    var = dist_nn.all_reduce((wide - mean.view(shape)).square().sum(dims)) / total
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
    y = (wide - mean.view(shape)) * (var + eps).rsqrt().view(shape)
    if weight is not None and bias is not None:
        y = y * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype)
