"""The notebook of the guide runs from top to bottom."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import matplotlib
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"
# To save time; the rest runs as it stands.
SHORTER = {
    "epochs, batch = 12, 50": "epochs, batch = 2, 50",
    "width=1.5": "width=0.5",
    'calls=60, engine="onnxruntime"': "calls=6",
}


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    for words, fewer in SHORTER.items():
        assert sum(words in cell for cell in code) == 1, words
        code = [cell.replace(words, fewer) for cell in code]
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for number, cell in enumerate(code):
            exec(compile(cell, f"cell {number}", "exec"), names)
    assert "the same class for 397 of 397 images" in printed.getvalue()
    assert printed.getvalue().count(" kept ") == 3
    assert (tmp_path / "digits-stages" / "manifest.json").is_file()
