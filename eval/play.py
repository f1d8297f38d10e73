"""The part of a report's page that one can play with: its data, from the per-input table.

N inputs, E exits
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynnet.evaluation.tables import Table, classifiers
from dynnet.learning.data import Data

MOST = 10_000  # inputs in a page; of more, as many are drawn at random
_PICTURES = 30  # of each kind
_SIDE = 96  # pixels of a picture, at most
PAGE = Path(__file__).parent / "page"


def pictures(table: Table, data: Data) -> list[dict[str, Any]]:
    """Inputs that a page shows: the easiest, the hardest, those that an early exit alone has right, and some at random.

    Returns:
        For each "row", in the table, and "src", a PNG as a data URI.
    """
    last = classifiers(table) - 1
    early = np.flatnonzero((table["correct"] == 1) & (table["exit"] < last) & (table[f"correct_{last}"] == 0))
    drawn = np.random.default_rng(0).permutation(len(table["exit"]))
    hardness = np.lexsort((-table["confidence"], table["macs"]))
    kinds = (hardness[:_PICTURES], hardness[::-1][:_PICTURES], early[:_PICTURES], drawn[:_PICTURES])
    rows = sorted({int(row) for kind in kinds for row in kind})
    return [{"row": row, "src": _uri(data.test.pixels(row))} for row in rows]


def _uri(pixels: np.ndarray) -> str:
    """(H, W, C) uint8 as a data URI."""
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def playground(table: Table, results: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the template is given.

    Args:
        table: of a report.
        results: of it.
        shown: as `pictures` gave it.
    """
    last, total = classifiers(table) - 1, len(table["exit"])
    rows = _rows(total, [int(one["row"]) for one in shown])
    place = {int(row): at for at, row in enumerate(rows)}
    engine = results.get("engine")
    heads = np.cumsum([0, *results["ledger"]["heads"]])[1:]
    # The heads that an input has passed are added in the page, as far as they are on.
    without = np.stack([table[f"macs_{e}"] - (heads[min(e, last - 1)] if last else 0) for e in range(last + 1)], 1)
    alike = bool((without == without[:1]).all())
    labels = table["label"].astype(int)
    names = {int(label): str(name) for label, name in zip(labels, table["class"], strict=True)}
    told = {
        "images": len(rows),
        "exits": results["exits"],
        "classes": [names.get(k, str(k)) for k in range(max(names, default=0) + 1)],
        "thresholds": results["thresholds"],
        "points": results.get("points", []),
        "heads": results["ledger"]["heads"],
        "every_vote": results.get("every_vote", False),
        "dense_macs": results["dense_macs"],
        "mean_macs": float(table["macs"][rows].mean()),
        "dense_accuracy": results["dense_accuracy"],
        "leaving_ms": None if engine is None else engine["leaving_ms"],
        "dense_ms": None if engine is None else engine["dense_ms"],
        "engine": None if engine is None else engine["engine"],
        "static": _static(results),
        "confidence": _base64(np.array([table[f"confidence_{e}"][rows] for e in range(last)]).T),
        "correct": _base64(np.stack([table[f"correct_{e}"][rows] for e in range(last + 1)], 1), np.uint8),
        "spent": _base64(without[0] if alike else without[rows]),
        "label": _base64(labels[rows], np.uint16),
        "thumbs": [{"row": place[int(one["row"])], "src": one["src"]} for one in shown],
    }
    script = (PAGE / "play.js").read_text()
    # An end of the element within it would end it for a browser.
    data = json.dumps(told, allow_nan=False).replace("</", "<\\/")
    kept = ("images", "dense_accuracy", "leaving_ms", "static")
    return {**{key: told[key] for key in kept}, "of": total, "data": data, "script": script}


def _rows(total: int, wanted: Sequence[int]) -> np.ndarray:
    """Rows of a table that are in the page, rising."""
    if total <= MOST:
        return np.arange(total)
    drawn = np.random.default_rng(0).permutation(total)[: MOST - len(wanted)]
    return np.unique(np.concatenate([drawn, np.asarray(wanted, dtype=int)]))


def _static(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Models beside it, by what they cost."""
    engine = results.get("engine") or {}
    ms = {(row["name"], row["method"]): row["ms"] for row in engine.get("static", [])}
    return [
        {
            "what": f"{row['method']}, {row['name']}",
            "dynamic": row["dynamic"],
            "accuracy": row["accuracy"],
            "macs": row["macs_share"] * results["dense_macs"],
            "line": [{"macs": share * results["dense_macs"], "accuracy": hit} for share, hit in row.get("line", [])],
            "ms": ms.get((row["name"], row["method"])),
        }
        for row in results.get("static", [])
    ]


def _base64(values: np.ndarray, dtype: type = np.float64) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def read_pictures(path: Path) -> list[dict[str, Any]]:
    """What `pictures` gave, saved by a report; none where an older one saved nothing."""
    return list(json.loads(path.read_text())) if path.is_file() else []
