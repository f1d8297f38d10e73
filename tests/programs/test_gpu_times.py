"""The program that times a GPU runs, in small, without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval import gpu


def test_all_sides_are_timed_at_what_they_cost(tmp_path: Path) -> None:
    gpu.main("cifar_resnet20", None, [2], calls=2, engine=None, device="cpu", out=tmp_path / "gpu.json")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["side"] for row in rows] == ["dense", "pruned to 45%", "exits, half leave at the first", "four widths"]
    assert rows[0]["faster"] == rows[0]["macs_share"] == 1
    assert rows[1]["macs_share"] == pytest.approx(0.45, abs=0.02)
    assert all(0.4 < row["macs_share"] < 0.9 and row["ms"] > 0 for row in rows[2:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no GPU of PyTorch's here; --device cpu tries the program" in capsys.readouterr().err
