"""The command `dynnet`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import dynnet
from dynnet import zoo
from dynnet.command import program
from dynnet.evaluation.tables import write_table
from dynnet.learning.sources import digits
from dynnet.serving.images import prepared


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight digits as files, named after what they are."""
    folder, (source, _) = tmp_path_factory.mktemp("digits"), digits()
    paths = []
    for row in range(0, 1600, 200):
        paths.append(folder / f"{row}_{int(source.labels[row])}.png")
        Image.fromarray(source.images[row, 0].numpy()).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "stages"
    assert program.main(["export", "digits", str(folder)]) == 0
    return folder


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert program.main(argv) == 0
    return capsys.readouterr().out


def test_the_zoo_is_listed_with_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines[1:]] == dynnet.list_models()
    found = json.loads(said(capsys, "list", "dig*", "--json"))
    assert found == {"digits": zoo.results("digits")}


def test_a_model_tells_its_exits_its_prices_and_what_was_promised(
    capsys: pytest.CaptureFixture[str], stages: Path, tmp_path: Path
) -> None:
    model = dynnet.create_model("digits")
    found = json.loads(said(capsys, "info", "digits", "--json"))
    assert [row["exit"] for row in found["exits"]] == list(model.exits)
    assert found["macs"] == model.ledger().dense
    assert found["flops"] == 2 * found["macs"]
    assert found["calibration"] == "fitted for budget=0.45 on 431 samples, an estimate"
    model.thresholds = [0.5, 0.5, 0.5]
    dynnet.save(model, tmp_path / "own.safetensors")
    assert "thresholds were set by hand" in said(capsys, "info", str(tmp_path / "own.safetensors"))
    exported = json.loads(said(capsys, "info", str(stages), "--json"))
    assert exported["engine"] == "onnxruntime"
    assert exported["exits"][-1]["exit"] == "end"
    assert "layer1.0" in said(capsys, "info", "cifar_resnet20")


def test_images_are_answered_as_the_model_does_in_pytorch_and_in_an_engine(
    capsys: pytest.CaptureFixture[str], images: list[Path], stages: Path
) -> None:
    argv = [str(path) for path in images]
    eager = json.loads(said(capsys, "predict", "digits", *argv, "--json"))
    engine = json.loads(said(capsys, "predict", str(stages), *argv, "--json", "--threads", "1"))
    model = dynnet.create_model("digits")
    pixels = torch.from_numpy(np.stack([np.array(Image.open(path), np.float32) for path in images]))[:, None]
    expected = model.predict((pixels / 255 - 0.5) / 0.5)
    for rows in (eager, engine):
        assert [row["class"] for row in rows] == [str(n) for n in expected.logits.argmax(1).tolist()]
        assert [row["macs"] for row in rows] == expected.macs.tolist()
        assert [row["exit"] for row in rows] == [[*model.exits, "end"][exit] for exit in expected.exit.tolist()]
    assert sum(row["class"] == path.stem[-1] for row, path in zip(engine, images, strict=True)) >= 7
    assert said(capsys, "predict", str(stages), argv[0]).splitlines()[0].split()[:2] == ["file", "class"]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(50, 80), (300, 200), (64, 64)])
def test_pictures_are_prepared_as_timm_does(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    rough = np.random.default_rng(0).integers(0, 255, (5, 5, 3)).astype(np.uint8)
    picture = Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)
    picture.save(tmp_path / "x.png")
    said = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 0.875, "interpolation": "bilinear"}
    said["crop_mode"] = mode  # type: ignore[assignment]
    transform = create_transform((3, 64, 64), **said)
    found = prepared(tmp_path / "x.png", (3, 64, 64), said)
    assert np.abs(found - transform(picture).numpy()).max() < 0.03


def test_a_misspelt_verb_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["lst"])
    assert "unknown verb 'lst'; did you mean 'list'?; choose from list, info, " in capsys.readouterr().err
    for verb in program.VERBS:  # all that are named are there
        with pytest.raises(SystemExit, match="0"):
            program.main([verb, "--help"])


def test_times_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "bench", "digits", "--batch", "2", "--calls", "3", "--threads", str(torch.get_num_threads()))
    assert "3 calls of 2 images: p50" in told
    assert "noise, on which" in told


def test_times_are_told_on_images(capsys: pytest.CaptureFixture[str], images: list[Path]) -> None:
    files, threads = [str(path) for path in images[:3]], str(torch.get_num_threads())
    told = said(capsys, "bench", "digits", *files, "--batch", "4", "--calls", "2", "--threads", threads)
    assert "3 images\n2 calls of 4 images: p50" in told


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "digit"], "'digit' is no file or folder, no model of the zoo .*did you mean 'digits'"),
        (["info", "{folder}"], r"holds no exported model \(manifest.json is missing"),
        (["predict", "digits", "{folder}/none.png"], "no image file '.*none.png'"),
        (["predict", "digits", "{folder}/text.png"], "cannot read image '.*text.png': it is none of BMP"),
        (["predict", "resnet18", "{folder}/text.png"], "'resnet18' is not trained here; name a model of the zoo"),
        (["export", "digits", "{folder}"], "is there already; remove it, or choose another folder"),
        (["bench", "cifar_resnet20"], "'cifar_resnet20' has no exits, and nothing to be compared with"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    assert program.main([part.format(folder=tmp_path) for part in argv]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert re.search(message, told), told


def test_an_exported_model_is_not_exported_again(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["export", str(stages), "elsewhere"]) == 2
    assert "is exported already; name what it was made from" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    argv = [sys.executable, "-W", "ignore", "-m", "dynnet", "list", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_a_table_is_summed_up_as_it_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, (source, _) = dynnet.create_model("digits"), digits()
    images = (source.images[:200].float() / 255 - 0.5) / 0.5
    found = dynnet.measure(model, [(images, source.labels[:200])])
    write_table(found.table(), tmp_path / "table.csv")
    told = json.loads(said(capsys, "report", str(tmp_path), "--json"))
    assert told["inputs"] == 200
    assert told["accuracy"] == pytest.approx(found.accuracy)
    assert told["mean_macs"] == pytest.approx(found.macs.mean())
    assert [row["share"] for row in told["exits"]] == pytest.approx(found.rates)
    assert [row["right_of_all"] for row in told["exits"]] == pytest.approx(found.answers.correct.mean(0))
    assert told["points"] == []
    assert f"200 inputs, {found.accuracy:.2%} right" in said(capsys, "report", str(tmp_path / "table.csv"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# a page\n\nwith, lines\n", "is no table of equal rows"),
        ("exit,macs\n0,1\n", "has no column 'confidence' of numbers"),
        ("exit,confidence,macs,correct\n", "has no"),
        ("exit,confidence,macs,correct\n0,high,3,1\n", "has no column 'confidence' of numbers"),
        (None, "no table in"),
    ],
)
def test_what_is_no_table_is_told(
    text: str | None, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "table.csv").write_text(text)
    assert program.main(["report", str(tmp_path / "table.csv")]) == 2
    assert words in capsys.readouterr().err
