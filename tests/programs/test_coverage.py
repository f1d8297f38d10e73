"""The table of architectures."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

from dynnet.evaluation.tables import read_table
from eval import coverage
from eval.exportable import exported
from eval.isolated import CutShortError, isolated


@pytest.mark.sweep
def test_coverage_examines_and_summarises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coverage.csv"
    coverage.main(out, names="test_vit3", real_params=60)
    coverage.main(out, names="test_vit[23]", real_params=60)
    text = capsys.readouterr().out
    rows = read_table(out)
    assert len(set(rows["name"])) == len(rows["name"]) >= 2
    assert set(rows["identical"]) == {"True"}
    count = len(rows["name"])
    assert f"{count} of {count} architectures take exits at 1/3 and 2/3" in text
    assert np.isnan(rows["exported"].astype(float)).all()  # not asked
    row = coverage.examine("resnet18", 0)
    assert 0.47 <= float(row["pruned"]) <= 0.53
    assert "resnet18: no place" in coverage.summary([row | {"wrapped": "False", "reason": "no place"}])


@pytest.mark.sweep
def test_a_table_is_completed_by_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coverage.csv"
    out.write_text("name,wrapped,real,reason,seconds\ntest_vit,True,False,,1.5\n")  # of before there were engines
    for _ in range(2):
        coverage.main(out, "test_vit", engine="onnxruntime", only_engine=True)
    rows = read_table(out)
    assert (rows["real"][0], rows["exported"][0], rows["cut"][0]) == ("False", "True", "True")
    assert rows["engine_error"][0] <= 1e-4
    assert rows["seconds"][0] > 1.5
    text = capsys.readouterr().out
    assert "1 of 1 answer, cut in stages, bit for bit as eager PyTorch" in text
    assert "1 of 1 answer in the engine within 0.0001" in text
    out.write_text("name,colour\n")
    with pytest.raises(SystemExit):
        coverage.main(out, "test_vit")
    assert "has a column 'colour'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shard": "3/2"}, "shard='3/2': give the number of a part"),
        ({"only_engine": True}, "give --engine"),
        ({"engine": "onnxruntim"}, "did you mean 'onnxruntime'"),
    ],
)
def test_what_cannot_be_asked_is_told(asked: dict, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        coverage.main(**asked)
    assert message in capsys.readouterr().err


def test_large_models_are_not_tried(tmp_path: Path) -> None:
    row = exported("test_vit", "onnxruntime", 0.1, str(tmp_path))
    assert row == {"mparams": "0.4", "export_reason": "not tried, above 0.1 million parameters"}


def test_shards_and_samples_are_parts() -> None:
    every = coverage._names("*", "1/1", None)
    shards = [coverage._names("*", f"{part}/3", None) for part in (1, 2, 3)]
    assert sorted(name for shard in shards for name in shard) == sorted(every)
    small, large = (set(coverage._names("*", "1/1", count)) for count in (10, 40))
    assert len(small) == 10
    assert small < large < set(every)


@pytest.mark.sweep
def test_a_call_may_fail_in_its_own_process() -> None:
    assert isolated(max, (1, 2), seconds=60, gigabytes=16) == 2
    with pytest.raises(CutShortError, match="took more than 0.5 s"):
        isolated(time.sleep, (60,), seconds=0.5, gigabytes=16)
    with pytest.raises(CutShortError, match="its process ended with 3"):
        isolated(os._exit, (3,), seconds=60, gigabytes=16)
    with pytest.raises(CutShortError, match="MemoryError"):
        isolated(bytearray, (2**34,), seconds=60, gigabytes=4)
    with pytest.raises(CutShortError, match="ValueError: math domain error|ValueError: expected a nonnegative input"):
        isolated(math.sqrt, (-1.0,), seconds=60, gigabytes=16)
