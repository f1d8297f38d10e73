"""How far routers lean towards narrow widths, which is chosen together with thresholds: for MACs, or for time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dynnet.backbone.batches import taken_apart
from dynnet.backbone.modes import evaluating
from dynnet.backbone.twin import copy_of
from dynnet.deploy.whole_times import WholeTimes
from dynnet.errors import CalibrationError
from dynnet.gates.routers import Routers
from dynnet.model import DynamicModel
from dynnet.thresholds.answers import collect
from dynnet.thresholds.clocked import Clocked
from dynnet.thresholds.goals import Budget, Choice, Latency
from dynnet.thresholds.table import Table

_LEANINGS = (0.0, -4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)  # of routers, in their logits
_TRIES, _CLOSE = 6, 0.01  # budgets of MACs that are timed, and how near two of them come
_IMAGES = 256  # to time, at most, unless a batch has more

Batches = Iterable[Tensor | Sequence[Tensor]]


class Leant(NamedTuple):
    """What was chosen with one preference of the routers.

    Attributes:
        lean: how far they lean.
        table, choice: what the model says with it, and the thresholds.
    """

    lean: float
    table: Table
    choice: Choice


def leaning(goal: Budget | Latency, model: DynamicModel, routers: Routers, loader: Batches) -> Leant:
    """The best of several preferences of routers, which they have afterwards.

    Args:
        goal: of time: budgets of MACs are tried, and timed, until the time is met.
        model, routers: of it.
        loader: that can be gone through several times.

    Raises:
        CalibrationError: none reaches the goal; routers are as they were.
    """
    before = {name: tensor.clone() for name, tensor in routers.state_dict().items()}
    try:
        tables = [(lean, _asked(model, routers, loader, lean)) for lean in _LEANINGS]
        if isinstance(goal, Latency):
            best = _for_time(goal, model, tables, _some(loader, goal.batch_size))
        else:
            best = _for_macs(goal, tables)
    except BaseException:
        routers.load_state_dict(before)
        raise
    routers.lean_(best.lean)
    return best


def _asked(model: DynamicModel, routers: Routers, loader: Batches, lean: float) -> Table:
    routers.lean_(lean)
    answers = collect(model, loader)
    return Table(answers, model.ledger(answers.input_size), model.measure)


def _for_macs(goal: Budget, tables: Sequence[tuple[float, Table]]) -> Leant:
    found, failed = [], []
    for lean, table in tables:
        try:
            found.append(Leant(lean, table, goal.choose(table)))
        except CalibrationError as error:
            failed.append(error)
    if not found:
        raise failed[0]
    return max(found, key=lambda one: (one.choice.point.accuracy, -one.choice.point.macs))


def _for_time(goal: Latency, model: DynamicModel, tables: Sequence[tuple[float, Table]], images: Tensor) -> Leant:
    """The largest budget of MACs that keeps within the time, by halving what is left between one that does and one that
    does not."""
    with tempfile.TemporaryDirectory() as folder, evaluating(model):
        times = WholeTimes(model, images, goal.engine, goal.batch_size, Path(folder))
        dense = model.ledger().dense
        least, most = model.floor() / dense, 1.0
        about = times.engine, times.threads, times.batch_size
        best: Leant | None = None
        budget, shortest = min(max(goal.value, least), most), float("inf")
        for _ in range(_TRIES):
            try:
                tried = _for_macs(Budget(budget), tables)
            except CalibrationError:  # nobody is so sure of anything
                least = budget
            else:
                share = times.share(_at(model, tried), tried.lean)
                shortest = min(shortest, share)
                if share > goal.value:
                    most = tried.choice.point.macs / dense
                else:
                    choice = tried.choice._replace(clocked=Clocked(*about, times.dense_ms, share * times.dense_ms))
                    best, least = tried._replace(choice=choice), budget
            if most - least < _CLOSE:
                break
            budget = (least + most) / 2
    if best is None:
        raise CalibrationError(
            f"{goal.value} of the bare backbone's time in {times.engine} cannot be met on these samples: the least "
            f"that was tried took {shortest:.3f}; put an exit earlier, or choose narrower widths"
        )
    return best


def _at(model: DynamicModel, tried: Leant) -> DynamicModel:
    one = copy_of(model)
    assert isinstance(one.gates, Routers)
    one.gates.lean_(tried.lean)
    one.thresholds = tried.choice.point.thresholds
    return one


def _some(loader: Batches, least: int) -> Tensor:
    """The first images."""
    images = chain.from_iterable(taken_apart(batch, number)[0] for number, batch in enumerate(loader))
    found = list(islice(images, max(_IMAGES, least)))
    return torch.stack([found[number % len(found)] for number in range(max(len(found), least))])
