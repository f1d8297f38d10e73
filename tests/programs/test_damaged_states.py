"""State files that somebody or something has altered are gone on with, or refused in words."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.programs.damage import alter, resign
from training import train

About = dict[str, Any]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_state_is_not_gone_on_with(damage: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mine / "state.safetensors"
    whole = path.read_bytes()
    left = {"truncated": whole[:-100], "flipped": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], "empty": b""}
    path.write_bytes(left[damage])
    assert train.main(["--out", str(mine), "--resume"]) == 2
    told = {"flipped": "its SHA-256 does not match"}.get(damage, "truncated or damaged")
    assert told in capsys.readouterr().err
    assert path.read_bytes() == left[damage]


def place(*keys: str, value: Any) -> Callable[[About], About]:
    """The change that puts a value somewhere."""

    def changed(about: About) -> About:
        inside: Any = about
        for key in keys[:-1]:
            inside = inside[int(key) if isinstance(inside, list) else key]
        inside[keys[-1]] = value
        return about

    return changed


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda about: {"kind": "backbone"}, "holds a 'backbone', not the state of a run"),
        (lambda about: {"kind": "state"}, "is damaged, or of another version of dynnet: it lacks 'program'"),
        (place("log_bytes", value="many"), "log_bytes is 'many'; expected a whole number"),
        (place("log_bytes", value=-5), "log_bytes is -5"),
        (place("position", "epoch", value=1.5), "position.epoch is 1.5; expected a whole number"),
        (place("position", "epoch", value=7), r"there is no Position\(stage=2, epoch=7, step=1\) in the run"),
        (place("position", "step", value=3), "there is no Position"),
        (place("position", "step", value=0), "has no optimiser"),
        (place("position", "stage", value=-1), "there is no Position"),
        (place("position", "stage", value=10**12), "there is no Position"),
        (place("position", "moment", value=1), "unknown key 'position.moment'"),
        (place("optimizer", "param_groups", value=[]), "needs an optimiser"),
        (place("optimizer", "param_groups", "0", "momentum", value="x"), "has momentum='x', a new one 0.9"),
        (place("optimizer", "param_groups", "0", "params", value=[0]), "other groups of parameters"),
        (place("optimizer", "state", value={}), "is damaged: KeyError"),
        (place("optimizer", "state", "0", value={"step": "x"}), "optimizer.state.0.step is 'x'; expected a whole"),
        (place("optimizer", "state", "100000", value={}), "its optimiser has other parameters"),
        (place("shape", "removed", value=["layer9"]), "is damaged: PruneError: it has no 'layer9'"),
        (place("shape", "widths", value={"conv1": [-3, 1]}), "is damaged: PruneError"),
        (place("shape", "stated", value={"": {"forward": 3}}), "is damaged: "),
        (place("shape", "features", value=[10**12] * 9), "is damaged: "),
        (place("recipe", "joint", "lr", value=7), "joint.lr was 7, is 0.1"),
        (place("splits", "train", "images", value=None), "splits.train.images is None"),
    ],
)  # fmt: skip
def test_a_description_that_was_altered_is_told(
    changed: Callable[[About], About], told: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resign(mine / "state.safetensors", changed)
    assert train.main(["--out", str(mine), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {str(mine / 'state.safetensors')!r} ")
    assert re.search(told, error), error
    assert not (mine / "model.safetensors").exists()


@pytest.mark.parametrize("count", [30, pytest.param(400, marks=pytest.mark.sweep)])
def test_an_altered_description_ends_in_a_model_or_in_words(
    count: int, dead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = 0
    for seed in range(count):
        out = tmp_path / str(seed)
        shutil.copytree(dead, out)
        chance = random.Random(seed)
        resign(out / "state.safetensors", lambda about, chance=chance: alter(about, chance))  # type: ignore[misc]
        status = train.main(["--out", str(out), "--resume"])
        error = capsys.readouterr().err
        assert (status, error == "") in ((0, True), (2, False)), (seed, error)
        assert status == 0 or str(out / "state.safetensors") in error, (seed, error)
        assert (out / "log.jsonl").stat().st_size < 10_000
        refused += status != 0
        shutil.rmtree(out)
    assert refused > count / 2
