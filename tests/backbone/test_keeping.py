"""Dry runs leave nothing behind, whatever a model's code keeps."""

from __future__ import annotations

import functools
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import AverageMeter
from torch import Tensor, nn

from dynnet.backbone.dry_run import trace
from dynnet.channels.finding import find_groups
from tests.cases import CHAIN, chain

KEPT: list[Tensor] = []
LAST: Any = None


@functools.lru_cache
def table(size: int) -> Tensor:
    return torch.arange(size)


class Meter:
    """Somebody's object that a hook tells what it has seen."""

    def __init__(self) -> None:
        self.value, self.history = None, deque[Any](maxlen=3)

    def update(self, value: Any) -> None:
        self.value = value
        self.history.append(value)


class Keeping(nn.Module):
    """Keeps what it sees in all the places that there are."""

    tables: dict[int, Tensor] = {}  # noqa: RUF012
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()
        self.features: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor, seen: set[Any] = set()) -> Tensor:  # noqa: B006
        global LAST
        Keeping.calls += 1
        LAST = self.last = x
        KEPT.append(x)
        seen.add(x.device.type)
        self.features.append(x)
        self.tables[x.shape[-1]] = x
        table(x.shape[-1])
        random.random()
        np.random.random()
        return self.net(x + float(torch.rand(1)))


@pytest.mark.parametrize("dry_run", [lambda m: trace(m, CHAIN, 2), lambda m: find_groups(m, CHAIN)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dry_run_leaves_nothing_behind(dry_run: Any, device: str) -> None:
    model, meter, average, listed, counted = Keeping().to(device), Meter(), AverageMeter(), [], 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal counted
        counted += 1
        module.seen = output

    model.net[0].register_forward_hook(lambda module, args, output: listed.append(output))
    model.net[1].register_forward_hook(functools.partial(lambda to, module, args, output: to.update(output), meter))
    model.net[2].register_forward_hook(lambda module, args, output: meter.history.append(output))
    model.net[3].register_forward_hook(count)
    model.net[5].register_forward_hook(lambda module, args, output: average.update(output))
    model.net[4].register_forward_pre_hook(lambda module, args: model.features.append(args[0]))

    def states() -> list[Any]:
        seen = Keeping.forward.__defaults__[0]
        here = [KEPT, model.features, listed, list(meter.history), list(seen), list(Keeping.tables.items())]
        plain = [LAST, model.last, meter.value, average.val, counted, Keeping.calls, table.cache_info().currsize]
        numbers = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        return [*map(list, here), *plain, hasattr(model.net[3], "seen"), *numbers]

    before = states()
    dry_run(model)
    for then, now in zip(before, states(), strict=True):
        assert then is now or (not isinstance(now, Tensor) and then == now)
    assert trace(model, CHAIN, 2).output[0].shape == (2, 4)
