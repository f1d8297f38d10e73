from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from dynnet.files.bundles import read_bundle
from training import train

TINY = """\
data: {name: digits, test: 0.7}
backbone: {name: cifar_resnet20, kwargs: {width: 0.125}}
wrap: {exits: [layer1.0], head_share: 0.2}
dense: {epochs: 1, batch_size: 128}
joint: {epochs: 1, batch_size: 128}
log_steps: 1
checkpoint_steps: 1
"""


class Killed(BaseException):
    """A process dies here."""


@pytest.fixture(scope="session")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in its last stage; not to be written to. Its recipe is beside it, as tiny.yaml."""
    out = tmp_path_factory.mktemp("dead")
    (out / "tiny.yaml").write_text(TINY)
    whole, steps = train.exit_losses, 0

    def mortal(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise Killed
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "exit_losses", mortal)
        with pytest.raises(Killed):
            train.main(["--recipe", str(out / "tiny.yaml"), "--out", str(out / "run")])
    about = read_bundle(out / "run" / "state.safetensors")[1]
    assert about["position"] == {"stage": 2, "epoch": 0, "step": 1}
    return out / "run"


@pytest.fixture
def mine(dead: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(dead, tmp_path / "run"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; `.ci/run` installs one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()
