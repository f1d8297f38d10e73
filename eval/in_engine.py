"""A dynamic model, its bare backbone and pruned models beside it, timed in the engine that they would be used in.

All are exported, and take turns on the same images, one at a time. What leaving at each exit takes is timed apart, on a
copy that has a stage for every exit, where all images are told to leave there: from that follows the time of any
thresholds. The model itself runs as it is exported, without the exits that are switched off.

M images, E exits
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynnet import DynamicModel, export, load
from dynnet.deploy import Runner, engines
from dynnet.deploy.stage_times import leaving_at
from dynnet.errors import ExportError
from dynnet.evaluation.timing import one_at_a_time
from eval.exported import Exported
from eval.savings import typical


def time_in_engine(
    model: DynamicModel, images: Tensor, static: Sequence[Mapping[str, Any]] = (), engine: str = "onnxruntime"
) -> dict[str, Any]:
    """Time them.

    Args:
        model: in eval mode, with thresholds set.
        images: (M, C, H, W) test images.
        static: from `eval.static.read_static`; what cannot be exported is left out, and named.
        engine: as for `dynnet.export`.

    Returns:
        "engine": as `eval.saved.InEngine` says; or None, and in "engine_reason" why there is nothing to be shown. Times
        are typical ones of an image, in milliseconds: medians by exit taken, weighed by how many of the M took it.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
            found = _timed(model, images, static, engine, Path(folder))
    except ExportError as error:
        return {"engine": None, "engine_reason": str(error)}
    notes = dict.fromkeys(str(warning.message) for warning in told)
    return {"engine": {**found, "notes": list(notes)}}


def _timed(
    model: DynamicModel, images: Tensor, static: Sequence[Mapping[str, Any]], engine: str, folder: Path
) -> dict[str, Any]:
    exported, threads = Exported(model, engine, folder), torch.get_num_threads()
    runs = {"dense": exported.dense(), "dynamic": exported.dynamic()}
    every = exported.every_exit()
    runs |= {f"leave {exit}": leaving_at(every, exit) for exit in range(len(model.exits) + 1)}
    left_out: list[str] = []
    for number, row in enumerate(static):
        place = folder / f"static_{number}"
        try:
            if Path(row["file"]).is_dir():
                place = Path(row["file"])  # exported already, in int8
            else:
                export(load(row["file"]), place, engine=engine, input_size=model.input_size)
            runs[f"static {number}"] = Runner(place, threads)
        except ExportError as error:
            left_out.append(f"{row['name']}, {row['method']}: {error}")
    ms = typical_ms(runs, images)
    keys = ("name", "method", "accuracy", "epochs", "dynamic")
    return {
        "engine": engines.named(engine),
        "threads": threads,
        "calls": len(images),
        "dense_ms": ms["dense"],
        "ms": ms["dynamic"],
        "leaving_ms": [ms[f"leave {exit}"] for exit in range(len(model.exits) + 1)],
        "switched_off": [name for name, on in zip(model.exits, model.running, strict=True) if not on],
        "static": [
            {**{key: row[key] for key in keys}, "ms": ms[f"static {number}"]}
            for number, row in enumerate(static)
            if f"static {number}" in runs
        ],
        "left_out": left_out,
    }


def typical_ms(runs: Mapping[str, Runner], images: Tensor) -> dict[str, float]:
    """Typical milliseconds of an image, by name, in turns and one at a time: medians by exit taken, weighed."""
    times = one_at_a_time(runs, images)
    taken = {
        name: np.concatenate([run.predict(one.numpy()).exit for one in images.split(1)]) for name, run in runs.items()
    }
    return {name: typical(times[name], taken[name]) for name in runs}
