"""What is measured of a model of the zoo, for its card: answers, bills, and times in an engine, others beside it.

E exits
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from dynnet import DynamicModel, export, load, measure
from dynnet.backbone.chain import bare_of
from dynnet.deploy import Runner, engines
from dynnet.deploy.stage_times import leaving_at
from dynnet.deploy.turns import take_turns
from dynnet.errors import CheckpointError, InputError
from dynnet.evaluation.measurement import Measurement
from dynnet.evaluation.threads import fit_threads
from dynnet.exits.threshold import to_json
from dynnet.learning.data import Data
from dynnet.learning.data_config import DataConfig
from dynnet.learning.recipes import Recipe, read_recipe
from dynnet.thresholds.answers import collect
from dynnet.thresholds.search import trade_off
from dynnet.thresholds.table import Table
from eval.controls import frozen_gates
from eval.exported import Exported
from eval.in_engine import typical_ms
from eval.results import spread
from eval.runs import test_images

POINTS = 12  # of the trade-off
_SINGLE = 700  # images timed one at a time
_BATCHES = 30  # timed calls at the larger batch size,
_WARMUP = 3  # and such that do not count


class Goal(TypedDict):
    """What thresholds were fitted for."""

    goal: str
    value: float
    samples: int


class Exit(TypedDict):
    """One exit, or the end.

    Attributes:
        macs_share: of the bare backbone's MACs, spent when an image answers here; heads before it included.
        rate: share of the images that leave here.
        accuracy: of these; None where there are none.
        accuracy_of_all: if all images left here.
    """

    name: str
    threshold: float | Literal["inf", "-inf"] | None
    macs_share: float
    rate: float
    accuracy: float | None
    accuracy_of_all: float


class Frozen(TypedDict):
    """The control of a gated model: the same gates, frozen at their mean decision on the calibration split."""

    accuracy: float
    macs: float


class Point(TypedDict):
    """Thresholds of the trade-off, fitted on the calibration split: milliseconds are of one image."""

    macs: float
    accuracy: float
    ms: float


class Other(TypedDict):
    """Another model on the same images; milliseconds are of one image, by batch size."""

    name: str
    what: str
    epochs: int | None
    dynamic: bool
    accuracy: float
    macs: float
    size_bytes: int
    ms: dict[str, float]


class Shown(TypedDict):
    """All that a card shows.

    Attributes:
        dense_accuracy, dense_macs, dense_ms: of the bare backbone; of a cascade, the last member alone.
        never_exiting_macs: mean of all images, where nobody exits and heads are off.
        ms, dense_ms: milliseconds of an image, by batch size.
    """

    model: str
    dataset: str
    test_images: int
    calibration: Goal | None
    accuracy: float
    never_exiting_accuracy: float
    never_exiting_macs: float
    dense_accuracy: float
    mean_macs: float
    dense_macs: float
    frozen: Frozen | None
    size_bytes: int
    exits: list[Exit]
    engine: str
    threads: int
    processor: str
    batch_size: int
    ms: dict[str, float]
    dense_ms: dict[str, float]
    curve: list[Point]
    beside: list[Other]


def shelved(
    model: DynamicModel, file: Path, recipe: Recipe, data: Data, others: Sequence[Path], engine: str, batch_size: int
) -> Shown:
    """Measure on the test split, at the thresholds that are saved with the model.

    Args:
        model: in eval mode.
        file: that it is from.
        recipe: that it was trained by.
        data: its splits.
        others: folders of finished runs, whose models stand beside it.
        engine: in which all are timed, in turns.
        batch_size: at which they are timed too, besides one image at a time.

    Raises:
        CheckpointError: another model is missing, or of other images.
        ExportError: one cannot be exported.
        InputError: the test split does not fill a batch.
    """
    if len(data.test) < batch_size:
        raise InputError(f"got {len(data.test)} test images for batches of {batch_size}; give a smaller --batch_size")
    rows = [_measured(path, data) for path in others]
    fit_threads(model, model.input_size, 256)
    found = measure(model, data.loader("test", 256))
    held_out = collect(model, data.loader("calibration", 256))
    alone = measure(bare_of(model), data.loader("test", 256))
    frozen = None if model.gates is None else frozen_gates(model, model.gates, held_out, data.loader("test", 256))
    points = trade_off(Table(held_out, found.ledger, model.measure))
    images = test_images(data, max(_SINGLE, _BATCHES * batch_size))[1]
    fit_threads(model, model.input_size, 1)
    with tempfile.TemporaryDirectory() as folder:
        exported = Exported(model, engine, folder)
        runs = {"dense": exported.dense(), "dynamic": exported.dynamic()}
        for number, path in enumerate(others):
            place = f"{folder}/other_{number}"
            export(load(path / "model.safetensors"), place, engine=engine, input_size=model.input_size)
            runs[str(number)] = Runner(place, torch.get_num_threads())
        every = exported.every_exit()
        leaving = {f"leave {exit}": leaving_at(every, exit) for exit in range(len(model.exits) + 1)}
        single = _times(runs | leaving, images[:_SINGLE], 1)
        many = _times(runs, images, batch_size)
    by_exit = np.array([single[name] for name in leaving])
    goal = model.calibration
    return {
        "model": recipe.backbone.name,
        "dataset": data.label,
        "test_images": len(found.exit),
        "calibration": None if goal is None else cast(Goal, {key: goal[key] for key in Goal.__annotations__}),
        "accuracy": found.accuracy,
        "never_exiting_accuracy": found.never_exiting_accuracy,
        "never_exiting_macs": float(found.answers.bills(found.ledger, [False] * len(model.exits))[:, -1].mean()),
        "dense_accuracy": alone.accuracy,
        "mean_macs": float(found.macs.mean()),
        "dense_macs": found.ledger.dense,
        "frozen": None if frozen is None else {"accuracy": frozen.accuracy, "macs": float(frozen.macs.mean())},
        "size_bytes": file.stat().st_size,
        "exits": _exits(model, found),
        "engine": engines.named(engine),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "batch_size": batch_size,
        "ms": {"1": single["dynamic"], str(batch_size): many["dynamic"]},
        "dense_ms": {"1": single["dense"], str(batch_size): many["dense"]},
        "curve": [_point(model, found, point.thresholds, by_exit) for point in spread(points, POINTS)],
        "beside": [
            {**row, "ms": {"1": single[str(number)], str(batch_size): many[str(number)]}}
            for number, row in enumerate(rows)
        ],
    }


def _times(runs: Mapping[str, Runner], images: Tensor, size: int) -> dict[str, float]:
    """Milliseconds of an image, by name: typical ones of single images, medians of batches."""
    if size == 1:
        return typical_ms(runs, images)
    whole = [batch for batch in images.split(size) if len(batch) == size]
    batches = [whole[i % len(whole)] for i in range(_WARMUP + _BATCHES)]
    times = take_turns(runs, batches, _WARMUP)
    return {name: float(np.median(calls)) / size for name, calls in times.items()}


def _exits(model: DynamicModel, found: Measurement) -> list[Exit]:
    bill = found.ledger.bill(model.running)
    last = len(model.exits)
    rows: list[Exit] = []
    for exit in range(last + 1):
        here = found.exit == exit
        rows.append(
            {
                "name": model.exits[exit] if exit < last else "end",
                "threshold": to_json(model.thresholds[exit]) if exit < last else None,
                "macs_share": float(bill[exit]) / found.ledger.dense,
                "rate": float(here.mean()),
                "accuracy": float(found.correct[here].mean()) if here.any() else None,
                "accuracy_of_all": float(found.answers.correct[:, exit].mean()),
            }
        )
    return rows


def _point(model: DynamicModel, found: Measurement, thresholds: Sequence[float], by_exit: np.ndarray) -> Point:
    taken, every = found.answers.route(thresholds), np.arange(len(found.exit))
    bills = found.answers.bills(found.ledger, model.measure.running(thresholds))
    return {
        "macs": float(bills[every, taken].mean()),
        "accuracy": float(found.answers.correct[every, taken].mean()),
        "ms": float(by_exit[taken].mean()),
    }


def _measured(path: Path, data: Data) -> Other:
    """Another model, but for its times."""
    file = path / "model.safetensors"
    if not file.is_file() or not (path / "recipe.yaml").is_file():
        raise CheckpointError(f"{str(path)!r} holds no finished run to stand beside")
    recipe, model = read_recipe(path / "recipe.yaml"), load(file)
    mine, theirs = (_tested_on(config) for config in (data.config, recipe.data))
    if mine != theirs:
        raise CheckpointError(f"{str(path)!r} would be tested on {theirs}, this model on {mine}; they must be the same")
    fit_threads(model, data.input_size, 256)
    found = measure(model, data.loader("test", 256))
    dynamic = isinstance(model, DynamicModel)
    return {
        "name": path.name,
        "what": _what(recipe, dynamic, path),
        "epochs": None if recipe.cascade.members else _epochs(path, recipe),
        "dynamic": dynamic,
        "accuracy": found.accuracy,
        "macs": float(found.macs.mean()),
        "size_bytes": file.stat().st_size,
        "ms": {},
    }


def _tested_on(config: DataConfig) -> dict[str, Any]:
    """What decides the images of the test split."""
    return {
        "data": config.label or config.name,
        "test_split": config.test_split,
        "test": config.test,
        "seed": config.seed,
    }


def _what(recipe: Recipe, dynamic: bool, path: Path) -> str:
    name = recipe.backbone.name
    if dynamic:
        return f"{name}, dynamic"
    if not (path / "results.json").is_file():  # of training.prune
        return f"{name}, dense"
    method = recipe.pruning.method + " + distillation" * bool(recipe.pruning.distill)
    return f"{name}, {method}"


def _epochs(path: Path, recipe: Recipe) -> int:
    """Of a run, and of those that its backbone's weights come from, where these are there to be asked."""
    own = sum(stage.epochs for stage in (recipe.dense, recipe.heads, recipe.joint, recipe.finetune))
    weights = Path(recipe.backbone.weights or path)
    before = weights.parent
    if before.resolve() == path.resolve() or not (before / "recipe.yaml").is_file():
        return own
    of_before = read_recipe(before / "recipe.yaml")
    dense_alone = weights.name == "backbone.safetensors"
    return own + (of_before.dense.epochs if dense_alone else _epochs(before, of_before))


def _processor() -> str:
    """As the system calls it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
