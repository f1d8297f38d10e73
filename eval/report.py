"""The report of a run: a per-input table, figures, and one page that works offline.

    python -m eval.report runs/digits
    python -m eval.report runs/cifar --data path/to/cifar10 --latency_samples 700
    python -m eval.report runs/cifar --static 'runs/cifar-pruned-*'   # pruned backbones beside, from training.prune
    python -m eval.report runs/digits --redraw true        # figures and page again, without the model

With gates it also shows what every region leaves open, and the control: the same gates frozen at their mean decision on
the calibration split. What is lost by that is what deciding by the input is worth.

Writes RUN/report/: table.csv, results.json, index.html, *.png. Thresholds are those saved with the model; the curve's
operating points are fitted on the calibration split; everything shown is of the test split.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, FileSystemLoader
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from dynnet import DynamicModel, fold, latency, measure
from dynnet.errors import DynnetError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.measurement import Measurement, read_table, write_table
from dynnet.evaluation.threads import fit_threads
from dynnet.exits.confidence import active, to_json
from dynnet.files.bundles import write_atomically
from dynnet.gates.freezing import mean_masks
from dynnet.gates.networks import Gates
from dynnet.gates.plan import GatePlan
from dynnet.learning.data import Data
from dynnet.thresholds.answers import Answers, collect, named_right
from dynnet.thresholds.calibration import trade_off
from eval import figures
from eval.programs import errors_told, write_json
from eval.runs import Run, open_run, test_images
from eval.static import beside, read_static, time_beside

POINTS = 14
GALLERIES = ("easiest", "hardest", "overthought")


def main(
    run: Path,
    data: str | None = None,
    latency_samples: int = 300,
    batch_size: int = 256,
    static: str | None = None,
    device: str | None = None,
    redraw: bool = False,
) -> None:
    """Write the report of a finished run.

    Args:
        run: folder of the run.
        data: folder of the dataset, where it is not the recipe's.
        latency_samples: test images to time one at a time; p99 needs 662.
        batch_size: of the evaluation.
        static: pattern of folders that `training.prune` has finished, to be shown and timed beside; of the same model
            and data. Runs of `training.train` on a pruned backbone that have a report may be among them.
        device: by default a GPU where there is one.
        redraw: draw again from an existing table; without the model, unless others are timed beside it. The galleries
            stay as they are.
    """
    out = run / "report"
    with errors_told():
        if redraw and not (out / "table.csv").is_file():
            raise DynnetError(f"no table to draw from in {str(out)!r}; write the report first")
        keep_freed_memory()
        opened = None if redraw and static is None else open_run(run, data, device)
        if opened is not None and not redraw:
            results = _evaluate(opened, out, latency_samples, batch_size)
        else:
            results = json.loads((out / "results.json").read_text())
        table = read_table(out / "table.csv")
        if static is not None and opened is not None:
            rows = read_static(static, results)
            print(f"timed beside: {fit_threads(opened.model, opened.data.input_size, 1)}", flush=True)
            results["static_timing"] = time_beside(rows, opened.model, test_images(opened.data, latency_samples)[1])
            results["static"] = beside(rows, table)
            write_json(results, out / "results.json")
    shown = figures.drawable(table, results)
    with plt.rc_context(figures.STYLE):
        for name, draw in shown.items():
            _save(draw(), out / f"{name}.png")
    drawn = [*shown, *(GALLERIES if results["exits"] else GALLERIES[:2])]
    write_atomically(out / "index.html", page(results, out, drawn).encode())
    print(f"report: {out / 'index.html'}")


def _evaluate(run: Run, out: Path, latency_samples: int, batch_size: int) -> dict[str, Any]:
    """Measure on the test split; writes table.csv, results.json and the galleries."""
    out.mkdir(parents=True, exist_ok=True)
    model, data = run.model, run.data
    thresholds = model.thresholds
    calibration = model.calibration
    test = data.loader("test", batch_size)
    print(f"evaluation: {fit_threads(model, data.input_size, batch_size)}", flush=True)
    measured = measure(model, test)
    print(measured, flush=True)
    table = measured.table()
    table["class"] = np.array(data.classes)[measured.answers.labels]
    table["file"] = np.array([data.test.name(i) for i in range(len(data.test))])
    table["dense_macs"] = np.full(len(measured.exit), measured.ledger.dense)
    table["dense_correct"] = named_right(run.dense, test).astype(int)
    bills = measured.answers.bills(measured.ledger, [True] * len(model.exits))
    for e in range(len(model.exits) + 1):
        table[f"macs_{e}"] = bills[:, e]
    held_out = collect(model, data.loader("calibration", batch_size))
    points = trade_off(held_out, measured.ledger, model.remembers)
    every = np.arange(len(measured.exit))
    for k, i in enumerate(np.unique(np.linspace(0, len(points) - 1, POINTS).round().astype(int))):
        taken = measured.answers.route(points[i].thresholds)
        running = active(points[i].thresholds, model.remembers)
        table[f"point{k}_macs"] = measured.answers.bills(measured.ledger, running)[every, taken]
        table[f"point{k}_correct"] = measured.answers.correct[every, taken].astype(int)

    gates = None if model.gates is None else _gates(model, model.gates, measured, held_out, test, table)

    rows, images = test_images(data, latency_samples)
    print(f"latency: {fit_threads(model, data.input_size, 1)}", flush=True)
    timed = latency(fold(model), images)
    for name, values in (("latency_ms", timed.dynamic_ms), ("dense_latency_ms", timed.dense_ms)):
        column = np.full(len(measured.exit), np.nan)
        column[rows[timed.rows[:, 0]].numpy()] = values
        table[name] = column
    write_table(table, out / "table.csv")

    results = {
        "model": run.recipe.backbone.name,
        "backbone_kwargs": run.recipe.backbone.kwargs,
        "dataset": data.label,
        "test_images": len(measured.exit),
        "epochs": run.recipe.heads.epochs + run.recipe.joint.epochs,
        "exits": list(model.exits),
        "thresholds": [to_json(t) for t in thresholds],
        "confidence": model.config.confidence,
        "calibration": calibration,
        "accuracy": measured.accuracy,
        "never_exiting_accuracy": measured.never_exiting_accuracy,
        "dense_accuracy": float(table["dense_correct"].mean()),
        "mean_macs": float(measured.macs.mean()),
        "dense_macs": measured.ledger.dense,
        "macs_share": measured.macs_share,
        "mean_flops": 2 * float(measured.macs.mean()),
        "dense_flops": 2 * measured.ledger.dense,
        "exit_rates": list(measured.rates),
        "accuracy_of_each_exit": [float(c) for c in measured.answers.correct.mean(0)],
        "ledger": {key: getattr(measured.ledger, key) for key in ("segments", "heads", "unpriced")},
        "gates": gates,
        "latency": timed.summary(),
        "latency_by_exit": {str(e): {"calls": n, "p50_ms": ms} for e, (n, ms) in timed.by_exit().items()},
    }
    write_json(results, out / "results.json")
    _galleries(table, data, out)
    return results


def _gates(
    model: DynamicModel, gates: Gates, measured: Measurement, held_out: Answers, test: Any, table: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What the gates did, and what the control does in their place; adds columns to the table."""
    regions = gates.plan.regions
    # Gates behind the exit of an image have nothing to decide on it.
    decided = [measured.exit >= region.segment for region in regions]
    for mask, here, region in zip(measured.answers.masks, decided, regions, strict=True):
        table[f"open:{region.layer}"] = np.where(here, mask.mean(1), np.nan)
    exits = held_out.route(model.thresholds)
    arrived = [exits >= region.segment for region in regions]
    gates.freeze(
        mean_masks(
            [mask[here] if here.any() else mask for mask, here in zip(held_out.masks, arrived, strict=True)], gates.plan
        )
    )
    try:
        frozen = measure(model, test)
    finally:
        gates.thaw()
    table["frozen_macs"], table["frozen_correct"] = frozen.macs, frozen.correct.astype(int)
    return {
        "share": gates.plan.macs_share,
        "regions": gate_use(
            [mask[here] for mask, here in zip(measured.answers.masks, decided, strict=True)], gates.plan
        ),
        "frozen_accuracy": frozen.accuracy,
        "frozen_macs_share": frozen.macs_share,
    }


def gate_use(masks: Sequence[np.ndarray], plan: GatePlan) -> list[dict[str, Any]]:
    """How the gates of every region were used.

    Args:
        masks: for each region (n, U) bool, of the n images that got there.
        plan: of the gates.

    Returns:
        For each region "layer", "units" and "images": n; and, NaN where n is 0, "open": the mean share of open units,
        "dead" and "always": shares of the units that are open for no image and for all, "differ": the mean share of the
        units on which two images differ, and "masks": how many different masks there are.
    """
    found = []
    for mask, region in zip(masks, plan.regions, strict=True):
        rates = mask.mean(0) if len(mask) else np.full(region.units, np.nan)
        found.append(
            {
                "layer": region.layer,
                "units": region.units,
                "images": len(mask),
                "open": float(rates.mean()),
                "dead": float((rates == 0).mean()),
                "always": float((rates == 1).mean()),
                "differ": float((2 * rates * (1 - rates)).mean()),
                "masks": len(np.unique(np.packbits(mask, axis=1), axis=0)),
            }
        )
    return found


def _galleries(table: dict[str, np.ndarray], data: Data, out: Path) -> None:
    """The inputs that took the least and the most compute, and those on which early was right and late was wrong."""
    last = figures.classifiers(table) - 1
    confidence, exit, correct = table["confidence"], table["exit"], table["correct"] == 1
    easiest = np.lexsort((-confidence, table["macs"]))[:20]
    hardest = np.lexsort((confidence, -table["macs"]))[:20]
    overthought = np.flatnonzero(correct & (exit < last) & (table[f"correct_{last}"] == 0))
    overthought = overthought[np.argsort(-confidence[overthought])][:20]

    def pictures(rows: np.ndarray, other: bool = False) -> list[tuple[np.ndarray, str]]:
        found = []
        for i in rows:
            said = data.classes[table["prediction"][i]]
            mark = "" if correct[i] else f"\n(is {data.classes[table['label'][i]]})"
            if other:
                mark = f"\n(end: {data.classes[table[f'prediction_{last}'][i]]})"
            spent = f"{table['macs'][i] / table['dense_macs'][i]:.0%}"
            where = f"{figures.exit_name(table, int(exit[i]))}, {spent}" if last else spent
            found.append((data.test.pixels(int(i)), f"{said}{mark}\n{where}"))
        return found

    shown = [
        ("Easiest: the least compute, most confident", pictures(easiest)),
        ("Hardest: the most compute, least confident", pictures(hardest)),
        ("Right early, where the last exit is wrong", pictures(overthought, other=True)),
    ]
    with plt.rc_context(figures.STYLE):
        for name, (title, images) in zip(GALLERIES if last else GALLERIES[:2], shown, strict=False):
            _save(figures.gallery(title, images), out / f"{name}.png")


def page(results: dict[str, Any], out: Path, names: Sequence[str]) -> str:
    """One HTML page with the figures of these names inside."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    drawn = {
        name: "data:image/png;base64," + base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in names
    }
    return environment.get_template("report.html.j2").render(r=results, figures=drawn)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
