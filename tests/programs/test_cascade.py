"""Models in a row, as a program leaves them and a report shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import dynnet
from eval import report
from training import cascade


def test_runs_in_a_row_are_calibrated_and_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cascade"
    argv = ["--recipe", str(run / "recipe.yaml"), "--out", str(out), f"--cascade.members=[{run}, {run}]"]
    more = ["--cascade.combine=mean", "--calibration.budget=0.8", "--calibration.accuracy_drop=null"]
    assert cascade.main([*argv, *more]) == 0
    model, member = dynnet.load(out / "model.safetensors"), dynnet.load(run / "model.safetensors")
    assert len(model.exits) == 2 * len(member.exits) + 1
    assert model.ledger().dense == member.ledger().dense
    assert model.calibration["goal"] == "budget"
    assert model.calibration["macs"] <= 0.8 * model.ledger().dense
    dense, there = (dynnet.load(path / "backbone.safetensors") for path in (out, run))
    x = torch.randn(2, *model.input_size)
    assert torch.equal(dense(x), there(x))
    report.main(out, latency_samples=5, engine=None)
    results = json.loads((out / "report" / "results.json").read_text())
    assert results["exits"] == list(model.exits)
    assert results["macs_share"] == pytest.approx(results["mean_macs"] / member.ledger().dense)
    assert "epochs" not in results  # which are its members'
    assert "calibrated for budget=0.8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("members", "more", "told"),
    [
        ("[]", (), "cascade.members has 0 entries"),
        ("[digits]", (), "cascade.members has 1 entries"),
        ("[digits, digitz]", (), "'digitz' is neither a finished run nor a model of the zoo, which has"),
        ("[digits, digits]", ("--data.seed=7",), "data.seed 0 and here 7; members"),
        (
            "[digits, digits]",
            ("--data.calibration=0.3", "--data.mean=[0.1]", "--data.std=[0.5]"),
            r"data.mean=\[0.1\]: the cascade takes",
        ),
    ],
)
def test_what_cannot_stand_in_a_row_is_told(
    members: str, more: tuple[str, ...], told: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--recipe", str(run / "recipe.yaml"), "--out", str(tmp_path / "x"), f"--cascade.members={members}", *more]
    assert cascade.main(argv) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()
