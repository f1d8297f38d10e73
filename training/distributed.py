"""Batch norms over all processes of a training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.nn.functional as dist_nn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


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
