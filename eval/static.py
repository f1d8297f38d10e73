"""Pruned backbones beside a dynamic model: what each gives for the same compute, and costs for the same accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dynnet import DynamicModel, fold, load
from dynnet.backbone.chain import bare_of
from dynnet.backbone.modes import device_of
from dynnet.errors import CheckpointError
from dynnet.evaluation.tables import Table, operating_line, read_table
from dynnet.evaluation.timing import one_at_a_time
from dynnet.learning.recipes import read_recipe
from eval.saved import Epochs, Hybrid, Pruned, Subject, checked, read_json

_PRUNED = "model.safetensors"  # of a pruning run,
_INT8 = "int8"  # which may have this folder
_REPEATS = 3  # calls on one image, of which the median counts: a total is at the mercy of the slowest ones


def read_static(pattern: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `training.prune` found, and `eval.report` of models that were trained on a pruned backbone.

    Args:
        pattern: of the folders of runs, with * in the last part.
        results: of the dynamic model.

    Returns:
        One row a model, the most accurate first: "name", "method", "accuracy", "macs_share" of the bare backbone,
        "sparsity", "size_bytes", "epochs" (after the dense stage), "dynamic": does it decide by the input?, "line": its
        operating points then, [share of the MACs, accuracy] each, and "file".

    Unfinished runs are named on the screen and left out.

    Raises:
        CheckpointError: no finished run, or one of another model or other images.
    """
    rows: list[dict[str, Any]] = []
    unfinished: list[str] = []
    for path in sorted(path for path in Path(pattern).parent.glob(Path(pattern).name) if path.is_dir()):
        for place in (path / "results.json", path / "report" / "results.json"):
            if place.is_file():
                found = read_json(place)
                for key, value in checked(Subject, found, place).items():
                    if key in Subject.__annotations__ and value != results[key]:
                        raise CheckpointError(f"{str(path)!r} is of {key}={value!r}, this run of {results[key]!r}")
                dense = results["dense_macs"]
                if "pruning" in found:
                    rows += _pruned(path, checked(Pruned, found, place), dense)
                else:
                    rows += _hybrid(path, checked(Hybrid, found, place), dense)
                break
        else:
            unfinished.append(str(path))
    told = f"not finished: {', '.join(unfinished)}" if unfinished else f"no folder matches {pattern!r}"
    if not rows:
        raise CheckpointError(
            f"{told}; prune with `python -m training.prune --out ...`, or, where a dynamic model was trained on a "
            f"pruned backbone, write its report"
        )
    if unfinished:
        print(f"left out, as {told}")
    return sorted(rows, key=lambda row: -row["accuracy"])


def _pruned(path: Path, found: Pruned, dense_macs: float) -> list[dict[str, Any]]:
    settings = found["pruning"]
    method = settings["method"] + f" in {settings['steps']} steps" * (settings["steps"] > 1)
    method += " + distillation" * bool(settings["distill"])
    kinds = [(method, _PRUNED, found["pruned"])]
    if "int8" in found:
        kinds.append((f"{method} + int8", _INT8, found["int8"]))
    return [
        {
            "name": path.name,
            "method": told,
            "accuracy": measured["accuracy"],
            "macs_share": measured["macs"] / dense_macs,
            "sparsity": measured["sparsity"],
            "size_bytes": measured["size_bytes"],
            "epochs": found["epochs"] + _epochs_before(path),
            "dynamic": False,
            "line": [],
            "file": str(path / file),
        }
        for told, file, measured in kinds
    ]


def _hybrid(path: Path, found: Hybrid, dense_macs: float) -> list[dict[str, Any]]:
    file = path / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{str(path)!r} has a report, but no {file.name}; train it anew, or leave it out")
    return [
        {
            "name": path.name,
            "method": "dynamic" + " on a pruned backbone" * (found["dense_macs"] < dense_macs),
            "accuracy": found["accuracy"],
            "macs_share": found["mean_macs"] / dense_macs,
            "sparsity": 0.0,
            "size_bytes": file.stat().st_size,
            "epochs": found["epochs"] + _epochs_before(path),
            "dynamic": True,
            "line": _line(path / "report" / "table.csv", dense_macs),
            "file": str(file),
        }
    ]


def _line(path: Path, dense_macs: float) -> list[list[float]]:
    """The operating points of a report; none where its table is gone."""
    if not path.is_file():
        return []
    macs, accuracies = operating_line(read_table(path))
    return [[float(spent / dense_macs), float(accuracy)] for spent, accuracy in zip(macs, accuracies, strict=True)]


def _epochs_before(path: Path) -> int:
    """Of all pruning from which a run has its backbone; 0 where that is not there to be asked."""
    epochs, seen = 0, set[Path]()
    while True:
        seen.add(path)
        weights = Path(read_recipe(path / "recipe.yaml").backbone.weights or path)
        path = weights.parent
        results = path / "results.json"
        # A pruning run also keeps the dense model; and no run is its own beginning, whatever its recipe says.
        if weights.name != _PRUNED or not results.is_file() or path in seen:
            return epochs
        epochs += checked(Epochs, read_json(results), results)["epochs"]


def time_beside(rows: Sequence[dict[str, Any]], model: DynamicModel, images: Tensor) -> dict[str, Any]:
    """Time the dynamic model, its bare backbone and all others in turns, one image at a time, batch norms folded.

    Args:
        rows: from `read_static`; each gets "p50_ms" and "speedup" over the bare backbone, by total time; None where it
            is exported, and does not run in PyTorch.
        model: in eval mode, with thresholds set.
        images: (M, C, H, W) test images.

    Returns:
        The same two figures of the dynamic model, as "p50_ms" and "speedup", and "dense_ms": the p50 of its backbone.
    """
    device, size = device_of(model), model.input_size
    runs = {"dense": bare_of(model), "dynamic": model}
    runs |= {str(number): load(row["file"]) for number, row in enumerate(rows) if not Path(row["file"]).is_dir()}
    runs = {name: fold(run, size).to(device) for name, run in runs.items()}
    times = {
        name: np.median(calls.reshape(_REPEATS, -1), axis=0)
        for name, calls in one_at_a_time(runs, images.repeat(_REPEATS, 1, 1, 1)).items()
    }
    for number, row in enumerate(rows):
        here = str(number) in times
        row |= _told(times[str(number)], times["dense"]) if here else {"p50_ms": None, "speedup": None}
    return {**_told(times["dynamic"], times["dense"]), "dense_ms": float(np.median(times["dense"]))}


def _told(times: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    return {"p50_ms": float(np.median(times)), "speedup": float(dense.sum() / times.sum())}


def beside(rows: Sequence[dict[str, Any]], table: Table) -> list[dict[str, Any]]:
    """The same rows with what the dynamic model does at equal compute and at equal accuracy.

    Read off the line through its operating points, whose thresholds are fitted on held-out images: "dynamic_accuracy"
    at the row's MACs, "dynamic_macs_share" at its accuracy; None for less compute or more accuracy than the line has.
    """
    shares, accuracies = operating_line(table)
    if not len(shares):
        shares, accuracies = table["macs"].mean(keepdims=True), table["correct"].mean(keepdims=True)
    shares = shares / table["dense_macs"].mean()
    best = np.maximum.accumulate(accuracies)  # who can spend more can also spend less
    found = []
    for row in rows:
        inside = shares[0] <= row["macs_share"]
        reached = np.flatnonzero(best >= row["accuracy"])
        share: float | None = None
        if len(reached):
            i = int(reached[0])
            near = slice(max(i - 1, 0), i + 1)
            share = float(np.interp(row["accuracy"], best[near], shares[near]))
        accuracy = float(np.interp(row["macs_share"], shares, best)) if inside else None
        found.append({**row, "dynamic_accuracy": accuracy, "dynamic_macs_share": share})
    return found
