"""What the test split says of a finished run: a table with a row for each image, and the figures that sum it up.

N images, U units of a region; classifiers are the exits and the final head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dynnet import DynamicModel, fold, latency, measure
from dynnet.evaluation.measurement import Measurement
from dynnet.evaluation.threads import fit_threads
from dynnet.evaluation.timing import Latency
from dynnet.exits.threshold import to_json
from dynnet.gates.networks import Gates
from dynnet.gates.plan import GatePlan
from dynnet.learning.data import Data, Loader
from dynnet.learning.processes import ALONE, Found, World
from dynnet.thresholds.answers import Answers, collect, named_right
from dynnet.thresholds.search import trade_off
from dynnet.thresholds.table import OperatingPoint, Table
from eval.controls import MEAN, controls
from eval.runs import Run, test_images

Columns = dict[str, np.ndarray]  # of the table, each (N,)

POINTS = 14


class Splits:
    """The images to evaluate on, of which each process takes whole batches: what they hold does not depend on how many
    processes there are, and so the last digits of answers do not.

    Args:
        data: the splits.
        batch_size: images of a batch.
        here: this process among all.
    """

    def __init__(self, data: Data, batch_size: int, here: World) -> None:
        self._here = here
        self.test = data.loader("test", batch_size, rank=here.rank, world=here.size, whole=True)
        self.held_out = data.loader("calibration", batch_size, rank=here.rank, world=here.size, whole=True)

    def all(self, found: Found, of: Loader) -> Found:
        """What all processes have found of the images of a loader, in their order."""
        return self._here.gathered(found, torch.cat(of.rows()).numpy())


def evaluate(
    run: Run, latency_samples: int, batch_size: int, here: World = ALONE
) -> tuple[Columns, dict[str, Any]] | None:
    """Measure on the test split, at the thresholds that are saved with the model.

    Args:
        run: finished.
        latency_samples: images to time one at a time, in the first process.
        batch_size: of all else.
        here: this process, among those that share the images.

    Returns:
        The columns of the table by name, each (N,), and the results, as JSON; None in all processes but the first.
    """
    model, data = run.model, run.data
    splits = Splits(data, batch_size, here)
    told = fit_threads(model, data.input_size, batch_size)
    measured = splits.all(measure(model, splits.test), splits.test)
    if here.first:
        print(f"evaluation: {told}\n{measured}", flush=True)
    table = _answers(run, measured, splits)
    held_out = splits.all(collect(model, splits.held_out), splits.held_out)
    points, columns = _operating_points(model, measured, held_out)
    table |= columns
    gates = None
    if model.gates is not None:
        columns, gates = _gates(model, model.gates, measured, held_out, splits)
        table |= columns
    if not here.first:
        return None
    columns, timed = _times(run, latency_samples)
    table |= columns
    more = {"gates": gates, "points": [[to_json(t) for t in thresholds] for thresholds in points]}
    return table, {**_summary(run, measured, table), **more, **_latencies(timed)}


def _answers(run: Run, measured: Measurement, splits: Splits) -> Columns:
    """What every image got, what the dense model makes of it, and what each classifier would cost."""
    data, count = run.data, len(measured.exit)
    table = measured.table()
    table["class"] = np.array(data.classes)[measured.answers.labels]
    table["file"] = np.array([data.test.name(i) for i in range(len(data.test))])
    table["dense_macs"] = np.full(count, measured.ledger.dense)
    table["dense_correct"] = splits.all(named_right(run.dense, splits.test), splits.test).astype(int)
    bills = measured.answers.bills(measured.ledger, [True] * len(run.model.exits))
    return table | {f"macs_{e}": bills[:, e] for e in range(bills.shape[1])}


def spread(points: Sequence[OperatingPoint], count: int) -> list[OperatingPoint]:
    """So many of the points, or all if there are fewer, from the first to the last."""
    return [points[i] for i in np.unique(np.linspace(0, len(points) - 1, count).round().astype(int))]


def _operating_points(
    model: DynamicModel, measured: Measurement, held_out: Answers
) -> tuple[list[tuple[float, ...]], Columns]:
    """Thresholds all along the trade-off, fitted on held-out images, and columns of compute and hits there."""
    points = trade_off(Table(held_out, measured.ledger, model.measure))
    chosen = [point.thresholds for point in spread(points, POINTS)]
    every = np.arange(len(measured.exit))
    columns: Columns = {}
    for k, thresholds in enumerate(chosen):
        taken = measured.answers.route(thresholds)
        running = model.measure.running(thresholds)
        columns[f"point{k}_macs"] = measured.answers.bills(measured.ledger, running)[every, taken]
        columns[f"point{k}_exit"] = taken
        columns[f"point{k}_correct"] = measured.answers.correct[every, taken].astype(int)
    return chosen, columns


def _gates(
    model: DynamicModel, gates: Gates, measured: Measurement, held_out: Answers, splits: Splits
) -> tuple[Columns, dict[str, Any]]:
    """What the gates did, and what controls do in their place."""
    regions = gates.plan.regions
    # Gates behind the exit of an image have nothing to decide on it.
    decided = [measured.exit >= region.segment for region in regions]
    masks = measured.answers.masks
    columns: Columns = {
        f"open:{region.layer}": np.where(got_there, mask.mean(1), np.nan)
        for mask, got_there, region in zip(masks, decided, regions, strict=True)
    }
    found = controls(model, gates, held_out, splits.test)
    known = {name: splits.all(measured, splits.test) for name, measured in found.items()}
    frozen = known.pop(MEAN)
    columns |= {"frozen_macs": frozen.macs, "frozen_correct": frozen.correct.astype(int)}
    return columns, {
        "macs_share": gates.plan.macs_share,
        "regions": gate_use([mask[got_there] for mask, got_there in zip(masks, decided, strict=True)], gates.plan),
        "frozen_accuracy": frozen.accuracy,
        "frozen_macs_share": frozen.macs_share,
        "controls": [
            {"name": name, "accuracy": control.accuracy, "macs_share": control.macs_share}
            for name, control in known.items()
        ],
    }


def gate_use(masks: Sequence[np.ndarray], plan: GatePlan) -> list[dict[str, Any]]:
    """How the gates of every region were used.

    Args:
        masks: for each region (n, U) bool, of the n images that got there.
        plan: of the gates.

    Returns:
        For each region "layer", "units" and "images": n; and, None where n is 0, "open": the mean share of open units,
        "dead" and "always": shares of the units that are open for no image and for all, "differ": the mean share of the
        units on which two images differ, and "masks": how many different masks there are.
    """
    found = []
    for mask, region in zip(masks, plan.regions, strict=True):
        rates = mask.mean(0) if len(mask) else None
        found.append(
            {
                "layer": region.layer,
                "units": region.units,
                "images": len(mask),
                "open": None if rates is None else float(rates.mean()),
                "dead": None if rates is None else float((rates == 0).mean()),
                "always": None if rates is None else float((rates == 1).mean()),
                "differ": None if rates is None else float((2 * rates * (1 - rates)).mean()),
                "masks": len(np.unique(np.packbits(mask, axis=1), axis=0)),
            }
        )
    return found


def _times(run: Run, count: int) -> tuple[Columns, Latency]:
    """Milliseconds of the dynamic model and its backbone, one image at a time; NaN for images that are not timed."""
    rows, images = test_images(run.data, count)
    print(f"latency: {fit_threads(run.model, run.data.input_size, 1)}", flush=True)
    timed = latency(fold(run.model), images)
    columns: Columns = {}
    for name, values in (("latency_ms", timed.dynamic_ms), ("dense_latency_ms", timed.dense_ms)):
        columns[name] = np.full(len(run.data.test), np.nan)
        columns[name][rows[timed.rows[:, 0]].numpy()] = values
    return columns, timed


def _summary(run: Run, measured: Measurement, table: Columns) -> dict[str, Any]:
    model, recipe, ledger = run.model, run.recipe, measured.ledger
    macs = float(measured.macs.mean())
    return {
        "model": recipe.backbone.name,
        "backbone_kwargs": recipe.backbone.kwargs,
        "dataset": run.data.label,
        "test_images": len(measured.exit),
        **({} if recipe.cascade.members else {"epochs": recipe.heads.epochs + recipe.joint.epochs}),
        "exits": list(model.exits),
        "thresholds": [to_json(t) for t in model.thresholds],
        "confidence": model.config.confidence,
        "every_vote": model.measure.every_vote,
        "calibration": model.calibration,
        "accuracy": measured.accuracy,
        "never_exiting_accuracy": measured.never_exiting_accuracy,
        "dense_accuracy": float(table["dense_correct"].mean()),
        "mean_macs": macs,
        "dense_macs": ledger.dense,
        "macs_share": measured.macs_share,
        "mean_flops": 2 * macs,
        "dense_flops": 2 * ledger.dense,
        "exit_rates": list(measured.rates),
        "accuracy_of_each_exit": [float(c) for c in measured.answers.correct.mean(0)],
        "ledger": {
            "segments": [segment.macs for segment in ledger.segments],
            "heads": list(ledger.heads),
            "unpriced": ledger.unpriced,
        },
    }


def _latencies(timed: Latency) -> dict[str, Any]:
    return {
        "latency": timed.summary(),
        "latency_by_exit": {str(e): {"calls": n, "p50_ms": ms} for e, (n, ms) in timed.by_exit().items()},
    }
