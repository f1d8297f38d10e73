"""The report of a run: a per-input table, figures, and one page that works offline.

    python -m eval.report runs/digits
    python -m eval.report runs/cifar --data path/to/cifar10 --latency_samples 700
    python -m eval.report runs/cifar --static 'runs/cifar-pruned-*'   # pruned backbones beside, from training.prune
    python -m eval.report runs/digits --redraw true        # figures and page again, without the model
    torchrun --nproc-per-node 2 -m eval.report runs/large  # processes share the images; the table is the same

Accuracy is also shown against time in the engine that the model would be used in (`--engine null` leaves that out).
With gates it also shows what every region leaves open, and the control: the same gates frozen at their mean decision on
the calibration split. What is lost by that is what deciding by the input is worth.

Writes RUN/report/: table.csv, results.json, index.html, *.png. Thresholds are those saved with the model; the curve's
operating points are fitted on the calibration split; everything shown is of the test split.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, FileSystemLoader
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from dynnet.errors import CheckpointError, DynnetError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.tables import Table, classifiers, read_table, write_table
from dynnet.evaluation.threads import fit_threads
from dynnet.files.bundles import write_atomically
from dynnet.learning.data import Data
from dynnet.learning.processes import world
from eval import figures
from eval.in_engine import time_in_engine
from eval.play import PAGE, pictures, playground, read_pictures
from eval.programs import errors_told, write_json
from eval.results import Columns, evaluate
from eval.runs import open_run, test_images
from eval.saved import read_report
from eval.static import beside, read_static, time_beside

PICTURES = "pictures.json"  # of inputs, for the page
GALLERIES = ("easiest", "hardest", "overthought")


def main(
    run: Path,
    data: str | None = None,
    latency_samples: int = 300,
    batch_size: int = 256,
    static: str | None = None,
    device: str | None = None,
    engine: str | None = "onnxruntime",
    redraw: bool = False,
) -> None:
    """Write the report of a finished run.

    Args:
        run: folder of the run.
        data: folder of the dataset, where it is not the recipe's.
        latency_samples: test images to time one at a time; p99 needs 662.
        batch_size: of the evaluation.
        static: pattern of folders that `training.prune` has finished, to be shown and timed beside; of the same model
            and data. Other runs of `training.train` that have a report may be among them; their curves are shown too.
        device: by default a GPU where there is one.
        engine: in which this model, its bare backbone and `static` are timed too; null for none.
        redraw: draw again from an existing table; without the model, unless others are timed beside it. The galleries
            stay as they are.
    """
    out = run / "report"
    with errors_told(), world() as here:
        if redraw and not (out / "table.csv").is_file():
            raise DynnetError(f"no table to draw from in {str(out)!r}; write the report first")
        keep_freed_memory()
        if redraw and not here.first:
            return
        opened = None if redraw and static is None else open_run(run, data, device or str(here.device))
        if opened is not None and not redraw:
            measured = evaluate(opened, latency_samples, batch_size, here)
            if measured is None:
                return
            results = _write(measured, opened.data, out)
        else:
            results = read_report(out / "results.json")
        table = read_table(out / "table.csv")
        rows = None if static is None or opened is None else read_static(static, results)
        if opened is not None:
            told = fit_threads(opened.model, opened.data.input_size, 1)
            images = test_images(opened.data, latency_samples)[1]
            if rows is not None:
                print(f"timed beside: {told}", flush=True)
                results["static_timing"] = time_beside(rows, opened.model, images)
                results["static"] = beside(rows, table)
            if engine is not None:
                print(f"timed in {engine}: {told}", flush=True)
                results |= time_in_engine(opened.model, images, rows or (), engine)
                print(_engine_told(results), flush=True)
            write_json(results, out / "results.json")
        _draw(table, results, out)
    print(f"report: {out / 'index.html'}")


def _write(measured: tuple[Columns, dict[str, Any]], data: Data, out: Path) -> dict[str, Any]:
    """Write table.csv, results.json and the galleries, which need the images; gives the results."""
    table, results = measured
    out.mkdir(parents=True, exist_ok=True)
    write_table(table, out / "table.csv")
    write_json(results, out / "results.json")
    _galleries(table, data, out)
    write_json(pictures(table, data), out / PICTURES)
    return results


def _engine_told(results: dict[str, Any]) -> str:
    found = results["engine"]
    if found is None:
        return f"no times in an engine: {results['engine_reason']}"
    faster = found["dense_ms"] / found["ms"]
    return f"  {found['ms']:.3f} ms an image, the bare backbone {found['dense_ms']:.3f}: {faster:.2f} times as fast"


def _draw(table: Table, results: dict[str, Any], out: Path) -> None:
    """Write the figures, and the page with them and the galleries."""
    shown = figures.drawable(table, results)
    play = playground(table, results, read_pictures(out / PICTURES))
    with plt.rc_context(figures.STYLE):
        for name, draw in shown.items():
            _save(draw(), out / f"{name}.png")
    drawn = [*shown, *(GALLERIES if results["exits"] else GALLERIES[:2])]
    write_atomically(out / "index.html", page(results, out, drawn, play).encode())


def _galleries(table: dict[str, np.ndarray], data: Data, out: Path) -> None:
    """The inputs that took the least and the most compute, and those on which early was right and late was wrong."""
    last = classifiers(table) - 1
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


def page(results: dict[str, Any], out: Path, names: Sequence[str], play: dict[str, Any] | None = None) -> str:
    """One HTML page with the figures of these names inside, and what one can play with.

    Raises:
        CheckpointError: a figure is not there.
    """
    environment = Environment(loader=FileSystemLoader(PAGE), autoescape=True)
    missing = [name for name in names if not (out / f"{name}.png").is_file()]
    if missing:
        raise CheckpointError(f"{str(out)!r} has no {missing[0]}.png; write the report anew, without --redraw")
    drawn = {
        name: "data:image/png;base64," + base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in names
    }
    style = (PAGE / "style.css").read_text()
    return environment.get_template("report.html.j2").render(r=results, figures=drawn, p=play, style=style)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
