"""Gradients that are right in every memory layout, and where a backbone computes parts of itself a second time.

In PyTorch 2.14.1 with oneDNN, on x86 processors without AVX-512, the weight gradient of a strided 1x1 convolution with
fewer than 8 input channels, not grouped, is wrong if its input or its weight lies in channels_last: by half of its
size, or by orders of magnitude. With one thread it is also written past its memory, which aborts the process. Of 4,464
convolutions (1d, 2d, 3d, grouped, transposed; one thread and two; float32 and bfloat16) no other was wrong, and no
output or gradient of an input. Such layers are small; dynnet runs them in the contiguous layout wherever their weights
learn on a CPU.

Gradient checkpointing runs parts of a forward again in the backward pass, when the call that they belonged to is over:
hooks are silent then. What hooks add for the first time (heads) therefore keeps its own tensors, `aside`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dynnet.errors import InputError

_INPUTS = 8  # from here on gradients are right

_here = threading.local()  # as function modes are


def at_risk(model: nn.Module, narrowed: Collection[str] = ()) -> list[str]:
    """Names of the convolutions whose weight gradients channels_last may get wrong, on some CPUs.

    Args:
        model: any.
        narrowed: layers that may run on fewer inputs than they have.
    """
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
        and _is_at_risk(layer.kernel_size, layer.stride, 1 if name in narrowed else layer.in_channels, layer.groups)
    ]


@contextlib.contextmanager
def right_gradients(needed: object = True) -> Iterator[None]:
    """While active, forwards take convolutions at risk whose weights learn on a CPU in the contiguous layout.

    Nothing is left on any model. Every torch function costs a Python call meanwhile (6% of a step of the smallest model
    in the zoo), so say what needs it.

    Args:
        needed: what `at_risk` found in the model that runs; if that is empty, nothing is done.
    """
    if not needed or getattr(_here, "active", False):
        yield
        return
    _here.active = True
    try:
        with _Contiguous():
            yield
    finally:
        _here.active = False


def checkpointed() -> bool:
    """Is this called in a part of a forward that gradient checkpointing will run again?

    Where a whole wrapped model is such a part, all that belongs to the call runs again with it, and that is no concern.
    """
    frame = sys._getframe(1)
    while frame is not None and (name := frame.f_globals.get("__name__")) != "dynnet.model":
        if name == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What runs meanwhile learns, and is no part of the forward around it: neither of its gradient checkpointing nor of
    its `no_grad`.

    Raises:
        InputError: the forward around it is checkpointed re-entrantly, so that no gradient comes back into it.
    """
    if not checkpointed():
        with torch.enable_grad():
            yield
    elif torch.is_grad_enabled():
        with saved_tensors_hooks(_same, _same):
            yield
    else:
        raise InputError(
            "gradient checkpointing is re-entrant here, and an exit inside of it would teach the backbone nothing; use "
            "use_reentrant=False, or switch it off with set_grad_checkpointing(False)"
        )


def _same(x: Tensor) -> Tensor:
    return x


class _Contiguous(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_conv2d if func is F.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    on_cpu = weight.requires_grad and weight.device.type == "cpu"
    if on_cpu and _is_at_risk(weight.shape[2:], stride, weight.shape[1], groups):
        moved = _contiguous(input), _contiguous(weight)
        if (moved[0] is not input or moved[1] is not weight) and checkpointed():
            raise InputError(
                f"gradient checkpointing would run a strided 1x1 convolution of {weight.shape[1]} inputs again in "
                f"channels_last, where its gradient is wrong on some CPUs; switch it off with "
                f"set_grad_checkpointing(False), or leave channels_last"
            )
        if torch.is_grad_enabled():
            input, weight = moved
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _is_at_risk(kernel: Sequence[int], stride: int | Sequence[int], inputs: int, groups: int) -> bool:
    strided = stride > 1 if isinstance(stride, int) else any(s > 1 for s in stride)
    return strided and inputs < _INPUTS and groups == 1 and all(k == 1 for k in kernel)


def _contiguous(x: Tensor) -> Tensor:
    """The tensor with the strides of the contiguous layout, those of its dimensions of size 1 too.

    `is_contiguous` does not look at these, but the choice of the kernel does: a weight of (O, I, 1, 1) in channels_last
    counts as contiguous, and is taken for channels_last.
    """
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.append(step)
        step *= max(size, 1)
    return x if x.stride() == tuple(reversed(strides)) else x.clone(memory_format=torch.contiguous_format)
