"""A per-input table, summed up: who left where, how right they were, and what it cost.

N inputs, E exits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dynnet.errors import CheckpointError
from dynnet.evaluation.tables import Table, classifiers, operating_line, read_table

_NEEDED = ("exit", "confidence", "macs", "correct")


def find_table(path: Path) -> Path:
    """Of a file, or of the folder of a run or of its report.

    Raises:
        CheckpointError: there is none.
    """
    for place in (path, path / "table.csv", path / "report" / "table.csv"):
        if place.is_file():
            return place
    raise CheckpointError(f"no table in {str(path)!r}; name a table.csv, or a run that eval.report has shown")


def summed_up(path: Path) -> dict[str, Any]:
    """What a table says.

    Returns:
        "inputs", "accuracy", "mean_macs", of "macs" and, where they were timed, "latency_ms" and "dense_latency_ms" the
        quantiles, "dense_macs" where it is known; "exits": for each its share of the inputs, how many of them it has
        right, how many of all inputs it would have, and the MACs there; "points": of the curve, where one was fitted.

    Raises:
        CheckpointError: it is no per-input table, or an empty one.
    """
    try:
        table = read_table(path)
    except (ValueError, IndexError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is no table of equal rows; name a table.csv of a report") from error
    missing = [name for name in _NEEDED if name not in table or table[name].dtype.kind not in "if"]
    if missing:
        raise CheckpointError(f"{str(path)!r} has no column {missing[0]!r} of numbers; name a table.csv of a report")
    if len(table["exit"]) == 0:
        raise CheckpointError(f"{str(path)!r} has no inputs; name a table.csv of a report")
    timed = {name: _quantiles(table[name]) for name in ("latency_ms", "dense_latency_ms") if name in table}
    return {
        "inputs": len(table["exit"]),
        "accuracy": float(table["correct"].mean()),
        "mean_macs": float(table["macs"].mean()),
        "macs": _quantiles(table["macs"]),
        **({"dense_macs": int(table["dense_macs"][0])} if "dense_macs" in table else {}),
        **{name: found for name, found in timed.items() if found is not None},
        "exits": [_of_exit(table, number) for number in range(max(classifiers(table), int(table["exit"].max()) + 1))],
        "points": [{"mean_macs": float(m), "accuracy": float(a)} for m, a in operating_line(table).T],
    }


def _of_exit(table: Table, number: int) -> dict[str, Any]:
    here = table["exit"] == number
    asked = table.get(f"correct_{number}")
    return {
        "exit": number,
        "share": float(here.mean()),
        "right": float(table["correct"][here].mean()) if here.any() else None,
        "right_of_all": None if asked is None else float(asked.mean()),
        "mean_macs": float(table["macs"][here].mean()) if here.any() else None,
    }


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Of those that are known; None where none is."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if len(known) == 0:
        return None
    return {name: float(np.quantile(known, share)) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
