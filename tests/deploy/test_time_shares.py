"""Exits placed by an engine's time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dynnet
from dynnet.deploy import time_shares
from dynnet.deploy.stage_times import Running, Times
from dynnet.deploy.time_shares import exits_by_time
from dynnet.errors import ExitError
from tests.cases import Case, tiny

CASE = Case("cifar_resnet20", (3, 32, 32))


@pytest.fixture
def slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in which the first boundary takes half of the time, and all others as long as each other."""

    def measured(model: dynnet.DynamicModel, sets: list[Running], **_: Any) -> dict[Running, Times]:
        count = len(model.exits)
        leaving = 5.0 + 5.0 * np.arange(count + 1)[:, None] / count
        return {sets[0]: Times(np.array([9.0]), leaving)}

    monkeypatch.setattr(time_shares, "measure_times", measured)


@pytest.mark.usefixtures("slow_start")
def test_exits_stand_where_their_share_of_the_time_is_spent() -> None:
    shares = time_shares.time_shares(CASE.backbone(), input_size=CASE.size)
    names = list(shares)
    assert shares[names[0]] == 0.5
    assert exits_by_time(CASE.backbone(), [0.4], input_size=CASE.size) == (names[0],)
    by_macs = dynnet.wrap(CASE.backbone(), [0.6], input_size=CASE.size).exits
    (by_time,) = exits_by_time(CASE.backbone(), [0.6], input_size=CASE.size)
    assert abs(shares[by_time] - 0.6) == min(abs(share - 0.6) for share in shares.values())
    assert names.index(by_time) < names.index(by_macs[0])
    assert exits_by_time(CASE.backbone(), 2, input_size=CASE.size)[0] == names[0]


def test_shares_are_measured_in_the_engine() -> None:
    backbone = tiny()
    shares = list(time_shares.time_shares(backbone, input_size=CASE.size).values())
    assert len(shares) == 2
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] <= 1
    assert not isinstance(backbone, dynnet.DynamicModel)
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("exits", "match"),
    [
        (["layer1"], "give shares of the time, such as"),
        ([0.5, 0.2], "list fractions in rising order"),
        ([1.5], "lies strictly between 0 and 1"),
        (99, "too few for 99 exits"),
    ],
)
def test_what_is_no_share_is_refused_before_anything_is_measured(exits: Any, match: str) -> None:
    with pytest.raises(ExitError, match=match):
        exits_by_time(CASE.backbone(), exits, input_size=CASE.size)
