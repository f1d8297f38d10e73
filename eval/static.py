"""Pruned backbones beside a dynamic model: what each gives for the same compute, and costs for the same accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynnet.errors import CheckpointError
from eval.figures import Table, operating_points


def read_static(pattern: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `training.prune` found.

    Args:
        pattern: of the folders of its runs, with * in the last part.
        results: of the dynamic model.

    Returns:
        One row a run, the most accurate first: "name", "method", "accuracy", "macs_share", "sparsity", "size_bytes",
        "speedup" (over the bare backbone, one image at a time), "epochs" (after the dense stage), "dense_accuracy".

    Raises:
        CheckpointError: no finished run, or one of another model or other images.
    """
    rows = []
    for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
        if not (path / "results.json").is_file():
            raise CheckpointError(f"{str(path)!r} holds no finished pruning; finish it with `python -m training.prune`")
        found = json.loads((path / "results.json").read_text())
        for key in ("model", "dataset", "test_images"):
            if found.get(key) != results[key]:
                raise CheckpointError(f"{str(path)!r} is of {key}={found.get(key)!r}, this run of {results[key]!r}")
        pruned, dense = found["pruned"], found["dense"]
        rows.append(
            {
                "name": path.name,
                "method": found["pruning"]["method"],
                "accuracy": pruned["accuracy"],
                "macs_share": pruned["macs"] / dense["macs"],
                "sparsity": pruned["sparsity"],
                "size_bytes": pruned["size_bytes"],
                "speedup": found["speedup"],
                "epochs": found["epochs"],
                "dense_accuracy": dense["accuracy"],
            }
        )
    if not rows:
        raise CheckpointError(f"no folder matches {pattern!r}; prune with `python -m training.prune --out ...`")
    return sorted(rows, key=lambda row: -row["accuracy"])


def beside(rows: Sequence[dict[str, Any]], table: Table) -> list[dict[str, Any]]:
    """The same rows with what the dynamic model does at equal compute and at equal accuracy.

    Read off the line through its operating points, whose thresholds are fitted on held-out images: "dynamic_accuracy"
    at the row's MACs, "dynamic_macs_share" at its accuracy; None outside of the line.
    """
    dense = table["dense_macs"].mean()
    points = sorted(
        (float(table[f"point{k}_macs"].mean() / dense), float(table[f"point{k}_correct"].mean()))
        for k in operating_points(table)
    )
    points = points or [(float(table["macs"].mean() / dense), float(table["correct"].mean()))]
    shares, accuracies = (np.array(values) for values in zip(*points, strict=True))
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
