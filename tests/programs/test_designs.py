"""Heads are compared on one frozen backbone: what never leaves is its own answer, whatever the heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dynnet
from eval import heads
from eval.designs import DESIGNS
from eval.runs import open_run
from training.compare import accuracy


def test_designs_are_told_beside_joint_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "HALVINGS", 1)
    heads.main(run, epochs=1, budgets=(0.1, 1.0), out=tmp_path / "heads.json")
    opened, rows = open_run(run), json.loads((tmp_path / "heads.json").read_text())["rows"]
    assert [row["heads"] for row in rows] == [*(d.name for d in DESIGNS), "trained together", "then its heads alone"]
    printed = capsys.readouterr().out.splitlines()[-len(rows) :]
    assert all(line.startswith(f"| {row['heads']} |") for line, row in zip(printed, rows, strict=True))
    alone = accuracy(opened.dense, opened.data, "calibration")
    together = accuracy(opened.model.backbone, opened.data, "calibration")
    last = [row["accuracy"][-1] for row in rows]
    assert last == pytest.approx([alone] * len(DESIGNS) + [together] * 2)
    for row in rows:
        assert [len(row["macs"]), len(row["accuracy"]), row["within"]["0.1"]] == [2, 3, None]
        assert 0.1 < row["within"]["1"] <= 1  # better than by chance
    fitted = dynnet.wrap(opened.dense, opened.model.exits, head_share=0.06).ledger()
    assert rows[2]["macs"] == [macs / fitted.dense for macs in fitted.heads]
    assert rows[-2]["macs"] == rows[-1]["macs"] == [macs / fitted.dense for macs in opened.model.ledger().heads]
