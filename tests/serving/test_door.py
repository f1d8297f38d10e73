"""What servers do with requests, without a server."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynnet.deploy import Runner
from dynnet.errors import InputError, RequestError
from dynnet.serving import __main__ as program
from dynnet.serving.door import Door, check_free
from dynnet.serving.images import prepared

DIGITS = Path(__file__).parents[2] / "docs" / "images" / "digits"


def test_a_body_is_what_its_file_is_and_is_answered_as_the_runner_answers(folder: Path) -> None:
    runner = Runner(folder, threads=1)
    door = Door(runner.manifest, folder)
    files = sorted(DIGITS.glob("*.png"))
    images = np.stack([door.image(path.read_bytes()) for path in files])
    assert np.array_equal(images[0], prepared(files[0], runner.manifest.input_size, runner.manifest.preparation))
    said = door.answers(runner.predict(images))
    assert [(one["class"], one["exit"]) for one in said] == [("5", "layer1.0"), ("6", "layer1.0"), ("3", "end")]
    assert {one["model"] for one in said} == {door.version}


def test_two_models_behind_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["thresholds"][0] = 0.5
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    versions = [Door(Runner(place, threads=1).manifest, place).version for place in (folder, tmp_path / "other")]
    assert versions[0] != versions[1]


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b"", "image/png", 400, "it is empty"),
        (b"hello", "image/png", 400, "it is none of BMP"),
        (b"{}", "application/json", 415, "the body is 'application/json'; send an image file"),
        (b"x" * 2001, "image/png", 413, "the body has 2001 bytes, more than 2000; send a smaller image"),
    ],
)
def test_what_is_no_image_is_told(folder: Path, body: bytes, kind: str, status: int, words: str) -> None:
    door = Door(Runner(folder, threads=1).manifest, folder, largest=2000)

    def asked() -> None:
        door.check(kind, len(body))
        door.image(body)

    with pytest.raises(RequestError, match=words) as raised:
        asked()
    assert raised.value.status == status


def test_an_image_of_another_size_is_resized(folder: Path) -> None:
    door = Door(Runner(folder, threads=1).manifest, folder)
    written = io.BytesIO()
    Image.new("RGB", (50, 31), "white").save(written, "jpeg")
    assert door.image(written.getvalue()).shape == (1, 8, 8)


def test_what_cannot_be_served_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert program.main([str(folder), "--port", port]) == 2
        assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err
    with pytest.raises(InputError, match="port 99999 of 127.0.0.1 cannot be had"):
        check_free("127.0.0.1", 99999)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert program.main([str(tmp_path), "--server", "litserve", "--port", port]) == 2
    assert "holds no exported model" in capsys.readouterr().err
