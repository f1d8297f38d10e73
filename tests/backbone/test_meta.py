"""Operators on the meta device say what PyTorch itself says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynnet.backbone.meta import run_on_meta

aten = torch.ops.aten


def empty(*size: int, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def told(output: Any) -> list[Any]:
    outputs = output if isinstance(output, (tuple, list)) else [output]
    return [(tuple(x.shape), x.stride(), x.dtype, x.device.type) for x in outputs]


C = [empty(6) for _ in range(4)]
X = empty(3, 6, 4, 4)
CASES = {
    "relu": (aten.relu.default, (X,)),
    "gelu, channels last": (aten.gelu.default, (empty(3, 6, 4, 4, last=True),)),
    "hardswish of every second column": (aten.hardswish.default, (X[..., ::2],)),
    "sigmoid of whole numbers": (aten.sigmoid.default, (empty(3, 6, dtype=torch.int64),)),
    "add": (aten.add.Tensor, (X, empty(3, 6, 4, 4))),
    "add, broadcast": (aten.add.Tensor, (X, empty(6, 1, 1))),
    "add, two layouts": (aten.add.Tensor, (X, empty(3, 6, 4, 4, last=True))),
    "add, two types": (aten.add.Tensor, (empty(3, 6, dtype=torch.float16), empty(3, 6))),
    "mul by a number": (aten.mul.Tensor, (X, 2.0)),
    "batch norm": (aten.native_batch_norm.default, (X, *C, False, 0.1, 1e-5)),
    "batch norm, channels last": (aten.native_batch_norm.default, (empty(3, 6, 4, 4, last=True), *C, False, 0.1, 1e-5)),
    "batch norm in training": (aten.native_batch_norm.default, (X, *C, True, 0.1, 1e-5)),
    "batch norm without statistics": (aten.native_batch_norm.default, (X, None, None, None, None, True, 0.1, 1e-5)),
    "layer norm": (aten.native_layer_norm.default, (empty(3, 5, 6), [6], C[0], C[1], 1e-5)),
    "layer norm over two dimensions": (aten.native_layer_norm.default, (X, [4, 4], None, None, 1e-5)),
    "addmm": (aten.addmm.default, (empty(7), empty(3, 6), empty(7, 6).t())),
    "addmm with a whole bias": (aten.addmm.default, (empty(3, 7), empty(3, 6), empty(6, 7))),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_types_and_layouts_are_pytorchs(case: str) -> None:
    operator, args = CASES[case]
    assert told(run_on_meta(operator, args, {})) == told(operator(*args))


def test_what_works_in_place_returns_what_it_was_given() -> None:
    x = empty(3, 6)
    assert run_on_meta(aten.relu_.default, (x,), {}) is x


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (aten.add.Tensor, (empty(3, 6), empty(3, 5))),
        (aten.native_layer_norm.default, (empty(3, 5), [6], C[0], C[1], 1e-5)),
        (aten.native_batch_norm.default, (empty(3, 5, 4, 4), *C, False, 0.1, 1e-5)),
        (aten.addmm.default, (empty(7), empty(3, 5), empty(6, 7))),
    ],
)
def test_what_does_not_fit_fails(operator: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError):
        run_on_meta(operator, args, {})
