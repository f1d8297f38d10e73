"""Per-input tables: as CSV files, and what their columns tell."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Table = Mapping[str, np.ndarray]  # columns by name, each (N,)


_NAMES = ("class", "file")  # which may look like numbers


def write_table(columns: dict[str, np.ndarray], path: Path) -> None:
    """Columns of equal length as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))


def read_table(path: Path) -> dict[str, np.ndarray]:
    """A CSV file of numbers and texts, by column; empty fields are NaN."""
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return {name: np.array(texts) if name in _NAMES else _column(texts) for name, texts in columns.items()}


def _column(texts: list[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            return np.array([text or "nan" for text in texts]).astype(kind)
        except ValueError:
            continue
    return np.array(texts)


def classifiers(table: Table) -> int:
    """E + 1, as the table's columns tell."""
    return sum(re.fullmatch(r"correct_\d+", name) is not None for name in table)


def operating_line(table: Table) -> np.ndarray:
    """(2, P) mean MACs and accuracies in [0, 1] of the operating points, from cheap to dear."""
    points = [(table[f"point{k}_macs"].mean(), table[f"point{k}_correct"].mean()) for k in operating_points(table)]
    return np.array(sorted(points)).reshape(-1, 2).T


def operating_points(table: Table) -> list[int]:
    """Numbers of the fitted operating points in the table."""
    return sorted(int(m[1]) for name in table if (m := re.fullmatch(r"point(\d+)_macs", name)))
