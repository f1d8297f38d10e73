"""Learning rates fall within the epochs that a stage has."""

from __future__ import annotations

import pytest
from torch import nn

from dynnet.learning.data import load_data
from dynnet.learning.data_config import DataConfig
from dynnet.learning.processes import ALONE
from dynnet.learning.recipes import Recipe, StageConfig
from training.tools import make_tools


@pytest.mark.parametrize(
    ("sched", "rates"),  # after 0, 0.4, 0.6, 0.8 of the updates, and at the last
    [
        ("step", [1, 0.1, 0.1, 0.01, 0.01]),
        ("multistep", [1, 1, 0.1, 0.01, 0.01]),
        ("poly", [1, 0.6, 0.4, 0.2, 0]),
        ("cosine", [1, 0.65, 0.35, 0.1, 0]),
    ],
)
def test_schedules_end_with_the_stage(sched: str, rates: list[float]) -> None:
    data = load_data(DataConfig(name="digits"))
    config = StageConfig(epochs=10, lr=1.0, sched=sched, warmup=0.0)
    tools = make_tools(nn.Linear(2, 2), config, "dense", Recipe(data=data.config), data, ALONE)
    updates = config.epochs * len(tools.loader)
    found = []
    for update in range(updates):
        found.append(tools.optimizer.param_groups[0]["lr"])
        tools.scheduler.step_update(update + 1)
    at = [found[int(share * updates)] for share in (0, 0.4, 0.6, 0.8)] + [found[-1]]
    assert at == pytest.approx(rates, abs=0.02)
