"""The demo app: what it shows of an image is what the model does with it."""

from __future__ import annotations

import math
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from playwright.sync_api import Browser

import dynnet
from dynnet.backbone.host import preparation_of, prepare_
from dynnet.errors import DataError
from dynnet.serving.images import prepared
from eval import app
from eval.one_image import Observer, Seen

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "docs" / "images" / "digits"


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of an app that is being served."""
    port = free_port()
    command = [sys.executable, "-m", "eval.app", "--engine", "null", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as served:
        assert served.stdout is not None
        said = ""
        for line in served.stdout:
            said += line
            if "Ctrl-C ends it" in line:
                break
        assert "Ctrl-C" in said, said
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except OSError:
                assert served.poll() is None
        yield f"http://127.0.0.1:{port}"
        served.terminate()


def test_an_image_goes_in_and_its_exit_comes_out(address: str, browser: Browser) -> None:
    page, asked = browser.new_page(viewport={"width": 1100, "height": 820}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.set_input_files("input[type=file]", DIGITS / "six.png")
    page.wait_for_selector("text=6: leaves at layer1.0, with confidence 0.990")
    page.set_input_files("input[type=file]", DIGITS / "three.png")
    page.wait_for_selector("text=3: goes to the end")
    slider = page.locator("input[type=range]")
    slider.fill("0.3")
    page.wait_for_selector("text=1: leaves at layer1.0")
    assert page.locator("input[type=checkbox]").is_checked()
    model = dynnet.create_model("digits")
    model.thresholds = [0.3] * 3
    image = torch.from_numpy(prepared(DIGITS / "three.png", model.input_size, {"mean": [0.5], "std": [0.5]})[None])
    shown = re.search(r"([\d.]+) of the bare backbone's ([\d.]+) MMAC", page.inner_text(".dynnet"))
    assert shown is not None
    assert shown[1] == f"{int(model.predict(image).macs[0]) / 1e6:.2f}"
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)  # it works offline
    page.close()


def looked(model: dynnet.DynamicModel, thresholds: list[float]) -> Seen:
    return Observer(model, None).look(DIGITS / "six.png", thresholds, calls=4)


def test_what_is_seen_of_gates_is_what_ran() -> None:
    backbone = timm.create_model("cifar_resnet20", in_chans=1)
    with pytest.raises(DataError, match="images of 1 channels, but the model's mean and std have 3 and 3 values"):
        prepared(DIGITS / "six.png", (1, 16, 16), preparation_of(backbone))
    prepare_(backbone, {"mean": (0.5,), "std": (0.5,)})
    model = dynnet.wrap(backbone, ["layer1", "layer2"], gates="channel", input_size=(1, 16, 16)).eval()
    end = looked(model, [math.inf, math.inf])
    assert [exit.name for exit in end.exits] == ["layer1", "layer2", "end"]
    assert len(end.open) == len(model.gates.plan.regions)
    model.thresholds = [math.inf, math.inf]
    image = torch.from_numpy(prepared(DIGITS / "six.png", (1, 16, 16), preparation_of(model))[None])
    assert end.exits[-1].macs == int(model.predict(image).macs[0])
    first = looked(model, [0.0, math.inf])
    assert first.taken == 0
    assert len(first.open) == sum(region.segment == 0 for region in model.gates.plan.regions)
    assert sum(first.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "cifar_resnet20"], "'cifar_resnet20' decides nothing by the input"),
        (["--model", "digit"], "did you mean 'digits'"),
        (["--images", "{folder}", "--engine", "null"], "no images in '{folder}'"),
        (["--port", "{port}"], "port {port} of 127.0.0.1 cannot be had"),
    ],
    ids=["plain", "unknown", "empty", "port"],
)
def test_what_cannot_be_served_is_told(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        port = int(door.getsockname()[1])
        known = {"folder": str(tmp_path), "port": str(port)}
        given = dict(
            zip([a.removeprefix("--") for a in argv[::2]], [a.format(**known) for a in argv[1::2]], strict=True)
        )
        with pytest.raises(SystemExit):
            app.main(
                given.get("model", "digits"),
                Path(given["images"]) if "images" in given else None,
                None,
                int(given.get("port", free_port())),
            )
    assert words.format(**known) in capsys.readouterr().err
