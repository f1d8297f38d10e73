"""What stages take in an engine: times of a model that leaves at each exit, and prices in time made of them.

E exits, S numbers of rows; exit number E is the backbone's own head
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dynnet.backbone.chain import bare_of, exits_before
from dynnet.backbone.twin import copy_of
from dynnet.cost.ledger import Ledger, Segment
from dynnet.deploy import engines
from dynnet.deploy.exporting import export
from dynnet.deploy.runner import Runner
from dynnet.deploy.turns import as_array, take_turns
from dynnet.model import DynamicModel

Running = tuple[bool, ...]  # which exits do

_SECONDS = 10.0  # of taking turns at a number of rows,
_FEWEST, _MOST, WARMUP = 12, 400, 5  # and how many turns
_STEP = 4  # from one number of rows to the next
_NANOSECONDS = 1e6  # in a millisecond: prices are whole numbers


@dataclass(frozen=True)
class Times:
    """Of an exported model with a set of exits that run.

    Attributes:
        dense: (S,) milliseconds of the bare backbone.
        leaving: (E + 1, S) and of the model where all rows leave at an exit; NaN where it has no stage.
    """

    dense: np.ndarray
    leaving: np.ndarray


Measure = Callable[[Sequence[Running]], Mapping[Running, Times]]


def measure_times(
    model: DynamicModel, sets: Sequence[Running], *, engine: str, threads: int, rows: Sequence[int]
) -> dict[Running, Times]:
    """Export a model with sets of exits on, and its bare backbone, and time them in turns, on noise.

    Args:
        model: in eval mode.
        sets: of exits that run.
        engine: as for `dynnet.export`.
        threads: of the engine.
        rows: numbers of images.

    Raises:
        ExportError: it cannot be exported, or the engine is not installed.
    """
    count = len(model.exits)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gates close other channels")  # told when it is exported to be used
        export(bare_of(model), f"{folder}/dense", engine=engine, input_size=model.input_size)
        runs: dict[str, Runner] = {"dense": Runner(f"{folder}/dense", threads)}
        for number, running in enumerate(sets):
            one = copy_of(model)
            one.thresholds = [0.0 if on else math.inf for on in running]
            export(one, f"{folder}/{number}", engine=engine)
            runner = Runner(f"{folder}/{number}", threads)
            for exit in _ends(running):
                runs[f"{number} {exit}"] = leaving_at(runner, exit)
        found = {running: Times(np.zeros(len(rows)), np.full((count + 1, len(rows)), np.nan)) for running in sets}
        for column, size in enumerate(rows):
            images = torch.randn(size, *model.input_size, generator=torch.Generator().manual_seed(0))
            times = take_turns(runs, [images] * (turns(runs, images) + WARMUP), WARMUP)
            for number, running in enumerate(sets):
                found[running].dense[column] = np.median(times["dense"])
                for exit in _ends(running):
                    # Paired: what slows the machine down for a while slows both.
                    ratio = np.median(times[f"{number} {exit}"] / times["dense"])
                    found[running].leaving[exit, column] = ratio * np.median(times["dense"])
    return found


def leaving_at(runner: Runner, exit: int) -> Runner:
    """The same stages, where all images leave at one exit; heads before it run too."""
    return runner.at([-math.inf if number == exit else math.inf for number in range(len(runner.exits))])


def _ends(running: Running) -> list[int]:
    """Numbers of the exits that have a stage, and of the end."""
    return [*(exit for exit, on in enumerate(running) if on), len(running)]


def turns(runs: Mapping[str, Runner], images: Tensor) -> int:
    """How many there is time for."""
    given = as_array(images)
    for runner in runs.values():
        runner.predict(given)
    began = time.perf_counter()
    for runner in runs.values():
        runner.predict(given)
    return int(np.clip(_SECONDS / (time.perf_counter() - began), _FEWEST, _MOST))


class StageTimes:
    """What every stage of a model takes in an engine, whichever exits run.

    Measured with one exit on at a time; what several exits take is put together from that, until it is measured too.

    Args:
        measure: of sets of exits, as `measure_times` does at `rows`.
        sets: that are measured at once: one for each exit, or one with all, where all run if any does; of a cascade
            also that of none, for its whole backbone is not what it is compared with.
        rows: (S,) numbers of rows, rising, up to the batch size.
        engine: and its version, in words.
        threads: of it.

    Attributes:
        measured: by sets of exits.
        dense: (S,) milliseconds of the bare backbone.
        whole: (S,) and of what runs where no exit does: the same, but for cascades.
    """

    def __init__(
        self, measure: Measure, sets: Sequence[Running], rows: Sequence[int], engine: str = "", threads: int = 1
    ) -> None:
        self.rows, self.engine, self.threads, self._measure = tuple(rows), engine, threads, measure
        self.measured: dict[Running, Times] = dict(measure(sets))
        self.exits = len(sets[0])
        self.dense = np.mean([self.measured[running].dense for running in sets], 0)
        nobody = (False,) * self.exits
        self.whole = self.leaving(nobody)[-1] if nobody in self.measured else self.dense
        ends, heads = [], []
        for exit in range(self.exits):
            alone = next((running for running in sets if running[exit] and sum(running) == 1), None)
            leaving = self.leaving(alone or sets[0])
            # Where nobody leaves, what is more than without exits is the head, its stage, and what crosses the cut.
            heads.append(np.maximum(leaving[-1] - self.whole, 0) if alone else np.zeros(len(rows)))
            ends.append(leaving[exit] - heads[-1])
        self._heads = np.array(heads).reshape(self.exits, len(rows))
        self._ends = np.maximum.accumulate(np.array([*np.minimum(ends, self.whole), self.whole]), 0)

    @classmethod
    def of(cls, model: DynamicModel, engine: str, batch_size: int) -> StageTimes:
        """Measure a model, in as many threads as PyTorch has.

        Raises:
            ExportError: as for `measure_times`.
        """
        rows = [_STEP**power for power in range(int(math.log(batch_size, _STEP)) + 1)]
        rows += [batch_size] if rows[-1] < batch_size else []
        threads = torch.get_num_threads()
        measure = partial(measure_times, model, engine=engine, threads=threads, rows=rows)
        alone = [[0.0 if e == exit else math.inf for e in range(len(model.exits))] for exit in range(len(model.exits))]
        sets = dict.fromkeys(tuple(model.measure.running(thresholds)) for thresholds in alone)
        if exits_before(model.backbone, model.exits):
            sets[(False,) * len(model.exits)] = None
        return cls(measure, list(sets), rows, engines.named(engine), threads)

    @property
    def batch_size(self) -> int:
        """B, for which times are told."""
        return self.rows[-1]

    def leaving(self, running: Running) -> np.ndarray:
        """(E + 1, S) milliseconds where all rows leave at an exit."""
        times = self.measured.get(running)
        if times is not None:
            return times.leaving / times.dense * self.dense
        spent = self._heads * np.array(running)[:, None]
        return self._ends + np.cumsum([*spent, np.zeros(len(self.rows))], 0)

    def learn(self, running: Running) -> None:
        """Measure what a set of exits takes."""
        self.measured |= self._measure([running])

    def mean(self, running: Running, taken: np.ndarray) -> float:
        """Milliseconds of a batch, in the mean over batches of samples that were drawn at random.

        Args:
            running: exits that do.
            taken: (N,) where samples leave.
        """
        if not any(running):
            return float(self.whole[-1])
        total, leaving = 0.0, self.leaving(running)
        for before, exit in itertools.pairwise([-1, *_ends(running)]):
            stage = np.maximum(leaving[exit] - (leaving[before] if before >= 0 else 0), 0)
            chance = binomial(self.batch_size, float((taken > before).mean()))
            total += float(chance @ np.interp(np.arange(self.batch_size + 1), [0, *self.rows], [0, *stage]))
        return total

    def ledger(self) -> Ledger:
        """Prices of a sample in nanoseconds, in batches of which all rows stay: for a search, which adds them up."""
        each = _NANOSECONDS / self.batch_size
        segments = np.diff(self._ends[:, -1], prepend=0) * each
        heads = [*self._heads[:, -1] * each, 0]
        return Ledger(tuple(Segment(round(s), round(h)) for s, h in zip(segments, heads, strict=True)), {})


def binomial(count: int, chance: float) -> np.ndarray:
    """(count + 1,) how likely 0, 1 ... of so many are drawn, each by itself with this chance."""
    if chance in (0.0, 1.0):
        return np.eye(count + 1)[int(count * chance)]
    drawn = np.arange(count + 1)
    ways = np.array([math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in drawn])
    return np.exp(ways + drawn * math.log(chance) + (count - drawn) * math.log1p(-chance))
