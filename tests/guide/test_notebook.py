"""The notebook of the guide runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    (training,) = (cell for cell in notebook.cells if "epochs, batch = 12, 50" in cell.source)
    training.source = training.source.replace("epochs, batch = 12", "epochs, batch = 2")  # to save time
    for cell in notebook.cells:
        cell.source = cell.source.replace("calls=60", "calls=6")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream"]
    assert any("the same class for 397 of 397 images" in text for text in printed)
    assert sum(text.count(" kept ") for text in printed) == 3
    assert (tmp_path / "digits-stages" / "manifest.json").is_file()
