"""Training on a folder of one's own, without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dynnet
from dynnet.learning.recipes import Recipe, read_recipe
from training import program, train

SMALL = ["--backbone.name", "cifar_resnet20", "--backbone.kwargs", "{width: 0.125}", "--wrap.exits", "[layer2]"]
SHORT = [
    "--calibration.budget=0.9",
    "--dense.epochs=1",
    "--heads.epochs=1",
    "--joint.epochs=1",
    "--dense.batch_size=8",
    "--heads.batch_size=8",
]


def put(root: Path, count: int) -> Path:
    """Bright and dark pictures."""
    generator = np.random.default_rng(0)
    for name, low in (("bright", 128), ("dark", 0)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(low, low + 128, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def run(data: Path, out: Path, *more: str) -> int:
    return train.main(["--data", str(data), "--out", str(out), *SMALL, *SHORT, "--joint.batch_size=8", *more])


def test_class_folders_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = put(tmp_path / "images", 20), tmp_path / "run"
    assert run(data, out) == 0
    said = capsys.readouterr().out
    assert "no --recipe given: as training/scratch.yaml says; from new weights" in said
    assert f"images: {data}, which has no folders 'train' and 'test'" in said
    assert "26 training images, 6 for calibration, 8 for testing" in said
    assert dynnet.load(out / "model.safetensors").class_names == ("bright", "dark")
    assert read_recipe(out / "recipe.yaml").dense.opt == "adamw"

    weights = str(out / "model.safetensors")  # with exits, of which it leaves the backbone
    (tmp_path / "split").mkdir()
    put(tmp_path / "split" / "train", 20), put(tmp_path / "split" / "val", 5)
    assert run(tmp_path / "split", tmp_path / "fine", "--backbone.weights", weights) == 0
    said = capsys.readouterr().out
    assert "no --recipe given: as training/finetune.yaml says\n" in said  # and fetches no others, though it would
    assert f"images: {tmp_path / 'split' / 'train'} to learn from, {tmp_path / 'split' / 'val'} to test on" in said
    assert read_recipe(tmp_path / "fine" / "recipe.yaml").dense.lr < 1e-3


def test_a_misspelt_split_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "images" / "Train", 5), put(tmp_path / "images" / "tests", 5)
    assert run(tmp_path / "images", tmp_path / "run") == 2
    assert "has no 'train' folder or train.tar; it holds ['Train', 'tests']" in capsys.readouterr().err


def test_a_folder_without_images_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("cat", "dog", "bird"):
        (tmp_path / "own" / kind).mkdir(parents=True)
    for kind in ("cat", "dog"):
        Image.new("RGB", (16, 16)).save(tmp_path / "own" / kind / "0.png")
    assert train.main(["--data", str(tmp_path / "own"), "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "has folders without images: bird; every folder is a class" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["true", "True", "yes"])
def test_pretrained_weights_are_finetuned_however_it_is_said(text: str) -> None:
    assert program._template(["--backbone.pretrained", text]).name == "finetune.yaml"


def test_templates_are_recipes_that_differ_in_what_they_begin_with() -> None:
    fine, scratch = (read_recipe(Path(train.__file__).parent / f"{name}.yaml") for name in ("finetune", "scratch"))
    assert fine.backbone.pretrained
    assert not scratch.backbone.pretrained
    for stage in ("dense", "joint", "finetune"):
        gentle, bold = getattr(fine, stage), getattr(scratch, stage)
        assert (gentle.lr, gentle.epochs) < (bold.lr, bold.epochs) < (Recipe().dense.lr, 100)


def test_nothing_to_learn_from_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "run")])
    assert "give --recipe, --data with the folder of your images, or --resume" in capsys.readouterr().err


def test_there_is_one_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    assert said.count("usage:") == said.count("--help") == said.count("  --data ") == 1
    assert "--joint.epochs" in said


def test_an_interrupt_names_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, whole = put(tmp_path / "images", 20), tmp_path / "run", train.exit_losses
    steps: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        steps.append(len(steps))
        if len(steps) == 5:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(train, "exit_losses", interrupted)
    assert run(data, out) == 130
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == f"stopped; go on with: python -m training.train --out {out} --resume"
    assert train.main(told.split("training.train ")[1].split()) == 0
    assert (out / "model.safetensors").is_file()
