"""What somebody's own code raises in a dry run is told with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dynnet
from dynnet.errors import ExitError, InputError
from tests.cases import tiny

ELSEWHERE = torch.ones(1, 16, 1, 1)

LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x.detach().numpy(),
    "numpy on the CPU": lambda x: x.detach().cpu().numpy(),
    "asarray": lambda x: np.asarray(x.detach()),
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.mean().item(),
    "if": lambda x: 1 if x.max() > 2 else 0,
    "index": lambda x: list(range(9))[x.argmax()],
    "format": lambda x: f"{x.mean():.3f}",
    "mask": lambda x: x[x > 0].sum(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "storage": lambda x: x.untyped_storage().tolist(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_hook_that_looks_at_numbers_is_told_so(look: str) -> None:
    backbone = tiny()
    handle = backbone[1].register_forward_hook(lambda module, args, output: (LOOKS[look](output), None)[1])
    with pytest.raises(
        ExitError, match="itself raised .*looks at numbers, and a dry run has shapes only: take that away"
    ):
        dynnet.wrap(backbone, 1, input_size=(3, 32, 32))
    handle.remove()
    dynnet.wrap(backbone, 1, input_size=(3, 32, 32))


def test_a_tensor_from_elsewhere_is_told() -> None:
    backbone = tiny()
    backbone[1].register_forward_hook(lambda module, args, output: output * ELSEWHERE)
    with pytest.raises(ExitError, match="brings a tensor that is not the model's: keep it as a buffer"):
        dynnet.wrap(backbone, 1, input_size=(3, 32, 32))


def test_a_hook_that_came_after_wrap_is_told_when_a_new_size_comes() -> None:
    model = dynnet.wrap(tiny(), ["1"], input_size=(3, 32, 32))
    seen = []
    model.backbone[1].register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))
    model.predict(torch.randn(2, 3, 32, 32))
    assert len(seen) == 1
    with pytest.raises(InputError, match=r"size \(3, 40, 24\).*looks at numbers"):
        model.predict(torch.randn(2, 3, 40, 24))
