"""A batch job over a folder of images: killed, it goes on, and ends with one row for each image."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynnet.deploy import Runner
from dynnet.learning.sources import digits
from dynnet.serving import batch
from dynnet.serving.images import prepared

pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stages, and 120 images, of which one is none."""
    made, (source, _) = tmp_path_factory.mktemp("job"), digits()
    shutil.copytree(folder, made / "stages")
    for row in range(120):
        path = made / "images" / str(int(source.labels[row])) / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.images[row, 0].numpy()).save(path)
    path.write_bytes(b"no image")
    return made


def test_a_part_has_a_row_for_each_image(place: Path, tmp_path: Path) -> None:
    """What a process does, without Ray."""
    files = sorted(str(path.relative_to(place / "images")) for path in (place / "images").rglob("*.png"))
    answering = batch.Answering(place / "images", place / "stages", tmp_path, batch=8, threads=1)
    done = answering({"number": np.array([3]), "names": np.array([files], dtype=object)})
    assert done["answered"].tolist() == [120]
    check(parquet.read_table(tmp_path / "part-000003.parquet").to_pydict(), files, place)


@pytest.mark.sweep
def test_a_job_that_is_killed_goes_on(place: Path) -> None:
    command = [sys.executable, "-m", "dynnet.serving.batch", str(place / "images"), str(place / "stages")]
    command += ["--out", str(place / "answers"), "--part", "30", "--batch", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if re.match(r"part \d+", line):
                break
        os.killpg(first.pid, signal.SIGKILL)
    assert len(list((place / "answers").glob("part-*.parquet"))) >= 1
    (place / "answers" / "part-000000.parquet").rename(place / "answers" / ".part-000000.parquet.1.tmp")  # half written
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "120 images are answered" in done.stdout
    table = parquet.read_table(place / "answers").to_pydict()
    files = sorted(str(path.relative_to(place / "images")) for path in (place / "images").rglob("*.png"))
    check(table, files, place)


def check(table: dict[str, list], files: list[str], place: Path) -> None:
    """Rows are what the runner answers, and words for what is no image."""
    assert table["file"] == files
    runner = Runner(place / "stages", threads=1)
    readable = [i for i, error in enumerate(table["error"]) if not error]
    assert len(readable) == 119
    (broken,) = set(range(120)) - set(readable)
    assert (table["prediction"][broken], table["exit"][broken]) == (-1, -1)
    assert "it is none of BMP" in table["error"][broken]
    said = runner.manifest
    images = np.stack([prepared(place / "images" / files[i], said.input_size, said.preparation) for i in readable])
    found = runner.predict(images)
    for column, expected in (("prediction", found.logits.argmax(1)), ("exit", found.exit), ("macs", found.macs)):
        assert [table[column][i] for i in readable] == expected.tolist()
    assert np.allclose([table["confidence"][i] for i in readable], found.confidence, atol=1e-4)


def test_another_job_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*argv: object) -> str:
        assert batch.main([str(a) for a in argv]) == 2
        return capsys.readouterr().err

    for option in ("--batch", "--part", "--processes", "--threads"):
        with pytest.raises(SystemExit, match="2"):
            batch.main([str(place / "images"), str(place / "stages"), "--out", str(tmp_path / "no"), option, "0"])
        assert f"argument {option}: '0': give a whole number of 1 or more" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert "no images in" in told(tmp_path / "none", place / "stages", "--out", tmp_path / "out")
    assert "holds no exported model" in told(place / "images", tmp_path, "--out", tmp_path / "out")
    assert "holds something else than answers" in told(place / "images", place / "stages", "--out", place)
    batch._begin(tmp_path / "out", {"model": "1", "images": "1", "part": 1000})
    words = told(place / "images", place / "stages", "--out", tmp_path / "out")
    assert "was begun with another model; go on with that, or choose another --out" in words
