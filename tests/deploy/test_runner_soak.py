"""A runner that answers for days stays as small as it was."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dynnet
from dynnet.deploy import Runner
from tests.cases import leave_one_by_one
from tests.exits.test_soak import NOISE, resident

CALLS, WARM = 100_000, 1_000
SIZES = (1, 2, 3, 5, 8, 16, 31, 64, 100)


@pytest.mark.sweep
def test_memory_stays_level_over_many_batch_sizes(tmp_path: Path) -> None:
    model = dynnet.create_model("digits")
    x = torch.randn(max(SIZES), *model.input_size, generator=torch.Generator().manual_seed(0))
    leave_one_by_one(model, x)
    dynnet.export(model, tmp_path / "stages")
    runner, drawn = Runner(tmp_path / "stages", threads=1), random.Random(0)
    images = x.numpy()
    taken, began = np.zeros(len(model.exits) + 1, int), time.monotonic()
    levels: list[int] = []  # after the first thousand, and after every tenth
    for call in range(CALLS):
        start = drawn.randrange(max(SIZES))
        given = np.roll(images, start, 0)[: drawn.choice(SIZES)]
        taken += np.bincount(runner.predict(given).exit, minlength=len(taken))
        if call + 1 == WARM or (call + 1) % (CALLS // 10) == 0:
            levels.append(resident())
    mebibytes = [level >> 20 for level in levels]
    print(f"{CALLS} calls in {time.monotonic() - began:.0f} s, exits {taken.tolist()}, MiB {mebibytes}")
    assert (taken > 0).all()
    assert levels[-1] < levels[0] + NOISE
