"""What goes on with --resume, and what is refused in words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dynnet.errors import CheckpointError
from dynnet.files import bundles
from dynnet.files.bundles import read_bundle, write_atomically
from dynnet.learning import sources
from dynnet.learning.processes import World
from dynnet.learning.sources import MemorySource
from tests.programs.damage import resign
from training import folder, prune, train
from training.log import Log

HERE = World(0, 1, torch.device("cpu"))


def change(out: Path, key: str, value: Any) -> None:
    """In the recipe of a run."""
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    *parents, last = key.split(".")
    place = recipe
    for parent in parents:
        place = place[parent]
    place[last] = value
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_what_decides_nothing_may_change(mine: Path) -> None:
    for key, value in (
        ("description", "again"),
        ("log_steps", 7),
        ("checkpoint_steps", 3),
        ("data.workers", 0),
        ("data.label", "eight by eight"),
    ):
        change(mine, key, value)
    assert train.main(["--out", str(mine), "--resume"]) == 0
    assert (mine / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seed", 1, "seed was 0, is 1"),
        ("joint.lr", 0.2, "joint.lr was 0.1, is 0.2"),
        ("joint.epochs", 2, "joint.epochs was 1, is 2"),
        ("joint.batch_size", 64, "joint.batch_size was 128, is 64"),
        ("joint.opt", "adamw", "joint.opt was 'sgd', is 'adamw'"),
        ("joint.sched", "none", "joint.sched was 'cosine', is 'none'"),
        ("dense.momentum", 0.5, "dense.momentum was 0.9, is 0.5"),
        ("loss.distill", 0.0, "loss.distill was 0.3, is 0.0"),
        ("ema", 0.9, "ema was None, is 0.9"),
        ("mixup", 0.2, "mixup was 0.0, is 0.2"),
        ("amp", True, "amp was False, is True"),
        ("channels_last", False, "channels_last was True, is False"),
        ("data.seed", 1, "data.seed was 0, is 1; .*splits.train.labels was '\\w+', is '\\w+'; splits.train.names was"),
        ("data.calibration", 0.3, "data.calibration was 0.15, is 0.3; .*splits.train.images was 458, is 377"),
        ("data.crop", 1, "data.crop was 0, is 1"),
        ("data.mean", [0.4], "data.mean was None, is .0.4.; .*preparation.mean was .0.5., is .0.4."),
        ("calibration.budget", 0.9, "calibration.budget was None, is 0.9"),
        ("wrap.exits", ["layer2.0"], "wrap.exits was .'layer1.0'., is .'layer2.0'."),
        ("backbone.kwargs", {"width": 0.25}, "backbone.kwargs.width was 0.125, is 0.25"),
        ("backbone.kwargs", {}, "backbone.kwargs.width was 0.125, is not there"),
    ],
)
def test_a_run_goes_on_as_what_it_was_begun_as(
    key: str, value: Any, told: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (mine / "state.safetensors").read_bytes()
    change(mine, key, value)
    assert train.main(["--out", str(mine), "--resume"]) == 2
    error = capsys.readouterr().err
    assert re.search(f"state.safetensors' is of another run: {told}", error), error
    assert "Put back what it was begun with" in error
    assert (mine / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize("changed", ["names", "labels", "order", "count"])
def test_other_images_are_noticed(
    changed: str, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, classes = sources.digits()
    rows, labels, names = torch.arange(len(found)), found.labels.clone(), list(found.names)
    if changed == "names":
        names = [f"other {name}" for name in names]
    elif changed == "labels":
        labels[0] = 9 - labels[0]
    elif changed == "order":
        rows = rows.flip(0)
    else:
        rows = rows[:-10]
    other = MemorySource(found.images, labels, names).subset(rows)
    monkeypatch.setattr("dynnet.learning.data.digits", lambda: (other, classes))
    assert train.main(["--out", str(mine), "--resume"]) == 2
    kind = {"names": "names", "labels": "labels", "order": "names", "count": "images"}[changed]
    assert re.search(rf"is of another run: .*splits\.\w+\.{kind} was ", capsys.readouterr().err)


def test_another_program_does_not_go_on(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune.main(["--out", str(mine), "--resume"]) == 2
    assert "program was 'training.train', is 'training.prune'" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["gone", "shorter", "longer"])
def test_a_log_goes_on_behind_what_is_there(left: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mine / "log.jsonl"
    whole = path.read_bytes()
    kept = read_bundle(mine / "state.safetensors")[1]["log_bytes"]
    assert 0 < kept <= len(whole)
    if left == "gone":
        path.unlink()
    elif left == "shorter":
        path.write_bytes(whole[: kept - 10])
    else:
        path.write_bytes(whole + b'{"half')
    assert train.main(["--out", str(mine), "--resume"]) == 0
    assert ("is shorter than it was" in capsys.readouterr().out) == (left != "longer")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = {"gone": 0, "shorter": whole[:kept].count(b"\n") - 1, "longer": whole[:kept].count(b"\n")}[left]
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:lines]))
    assert records[lines]["stage"] == "joint"
    assert records[-1]["kind"] == "calibration"


def test_a_log_knows_its_length_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n{"b": 2}\n')
    with Log(tmp_path, 9, HERE) as log:
        assert (log.bytes(), log.updates) == (9, 1)
        log.write({"c": 3})
        assert log.bytes() == 18
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_a_place_far_behind_a_log_makes_no_file_of_that_size(mine: Path) -> None:
    resign(mine / "state.safetensors", lambda about: {**about, "log_bytes": 10**12})
    assert train.main(["--out", str(mine), "--resume"]) == 0
    assert (mine / "log.jsonl").stat().st_size < 10_000


WAIT = """
import sys
from pathlib import Path
import torch
from dynnet.learning.processes import World
from training.folder import hold
with hold(Path(sys.argv[1]), World(0, 1, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", WAIT, str(mine)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        before = {path: path.read_bytes() for path in mine.iterdir() if path.is_file()}
        for argv in (["--resume"], ["--recipe", "models/digits/recipe.yaml"]):
            assert train.main(["--out", str(mine), *argv]) == 2
            assert f"is in use by process {other.pid} on " in capsys.readouterr().err
        assert {path: path.read_bytes() for path in mine.iterdir() if path.is_file()} == before
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        other.stdin.close()
        other.stdout.close()
    # The kernel has let go; and the dead one's lock file is in nobody's way.
    assert (mine / ".lock").exists()
    assert train.main(["--out", str(mine), "--resume"]) == 0
    assert not (mine / ".lock").exists()


def test_a_folder_is_left_as_it_was_found(tmp_path: Path) -> None:
    with folder.hold(tmp_path / "new", HERE):
        with pytest.raises(CheckpointError, match="is in use by process"), folder.hold(tmp_path / "new", HERE):
            pass
        with folder.hold(tmp_path / "new", World(1, 2, torch.device("cpu"))):
            pass  # another process of the same run
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with folder.hold(tmp_path / "old", HERE):
        (tmp_path / "old" / ".x.safetensors.1.tmp").touch()
    with folder.hold(tmp_path / "old", HERE):
        pass
    assert list((tmp_path / "old").iterdir()) == []


def test_where_nothing_can_be_locked_a_file_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "fcntl", None)
    with (
        folder.hold(tmp_path, HERE),
        pytest.raises(CheckpointError, match=r"is in use by process .*, or remove .*\.lock' if it is dead"),
        folder.hold(tmp_path, HERE),
    ):
        pass
    with folder.hold(tmp_path, HERE):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_what_a_killed_run_left_half_written_is_removed(mine: Path) -> None:
    for name in (".state.safetensors.123.tmp", ".log.jsonl.9.tmp"):
        (mine / name).touch()
    (mine / ".mine.tmp").touch()
    assert train.main(["--out", str(mine), "--resume"]) == 0
    assert sorted(path.name for path in mine.glob(".*")) == [".mine.tmp"]


def test_a_folder_that_cannot_be_written_to_is_told(
    tmp_path: Path, dead: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert train.main(["--recipe", str(dead.parent / "tiny.yaml"), "--out", str(tmp_path / "file" / "x")]) == 2
    assert re.search("cannot write in '.*file/x': Not a directory; choose another --out", capsys.readouterr().err)


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_file_is_whole_or_not_there_on_a_full_disk(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"old")
    patched = {"open": (Path, "open"), "fsync": (bundles.os, "fsync"), "replace": (Path, "replace")}[where]
    monkeypatch.setattr(*patched, full)
    with pytest.raises(CheckpointError, match=r"cannot write '.*x\.json': No space left on device; make room"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_on_a_full_disk_is_told(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, HERE)
    log.path = Path("/dev/full")
    with Path("/dev/full").open("wb", buffering=0) as log.file:
        log.board = None
        with pytest.raises(CheckpointError, match="cannot write '/dev/full': No space left.*the last checkpoint is"):
            log.write({"kind": "step"})


def test_a_run_on_a_full_disk_keeps_its_last_checkpoint(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (mine / "state.safetensors").read_bytes()
    monkeypatch.setattr(bundles.os, "fsync", full)
    assert train.main(["--out", str(mine), "--resume"]) == 2
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.undo()
    assert (mine / "state.safetensors").read_bytes() == before
    assert train.main(["--out", str(mine), "--resume"]) == 0


@pytest.mark.sweep
def test_a_run_goes_on_with_another_number_of_processes(mine: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "training.train", "--out", str(mine), "--resume"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in mine.glob(".*")] == []
    assert json.loads((mine / "log.jsonl").read_text().splitlines()[-1])["kind"] == "calibration"
