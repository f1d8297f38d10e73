"""Tables as CSV files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np


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
    return {name: _column([row[i] for row in rows]) for i, name in enumerate(header)}


def _column(texts: list[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            return np.array([text or "nan" for text in texts]).astype(kind)
        except ValueError:
            continue
    return np.array(texts)
