from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import dynnet
from tests.cases import FEW
from training import train

ROOT = Path(__file__).parent.parent

# The models are small: a second thread would only wait. Subprocesses and programs that choose threads are told so too.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

RECIPE = """\
data: {name: digits, crop: 1}
backbone: {name: cifar_resnet20, kwargs: {width: 0.25}}
wrap: {exits: [layer1.0, layer2.0], head_share: 0.1}
loss: {weights: equal, distill: 0.1, temperature: 1.0, equilibrium: true}
dense: {epochs: 2, batch_size: 64, decay_norms: false}
heads: {epochs: 1, batch_size: 64, decay_norms: false}
joint: {epochs: 2, batch_size: 64, decay_norms: false}
ema: 0.9
mixup: 0.2
log_steps: 5
checkpoint_steps: 4
"""


GATED = """\
data: {name: digits, crop: 1}
backbone: {name: cifar_resnet20, kwargs: {width: 0.5}}
wrap: {exits: %s, gates: {unit: 2, blocks: 1}}
budget: {target: 0.6, ramp: 0.1}
dense: {epochs: 1, batch_size: 64}
heads: {epochs: 1, batch_size: 64}
joint: {epochs: 2, batch_size: 64}
"""


@pytest.fixture(autouse=True)
def same_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages in a few seconds."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(
    scope="session",
    params=[pytest.param("[]", id="gates", marks=pytest.mark.sweep), pytest.param("[layer2.0]", id="gates and exits")],
)
def gated_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with gates; not to be written to, except by one report."""
    out = tmp_path_factory.mktemp("gated")
    (out / "recipe.txt").write_text(GATED % request.param)
    assert train.main(["--recipe", str(out / "recipe.txt"), "--out", str(out / "run")]) == 0
    return out / "run"


@pytest.fixture(scope="session")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of that recipe; not to be written to."""
    out = tmp_path_factory.mktemp("run") / "finished"
    assert train.main(["--recipe", str(recipe), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    case = FEW[0]
    dynnet.save(case.wrapped(), path, {"model_name": case.name, "num_classes": 7})
    return path.read_bytes()


@pytest.fixture
def saved(saved_once: bytes, tmp_path: Path) -> Path:
    """The file of a small wrapped model."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(saved_once)
    return path


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment, in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # torch and timm are lent by the environment that runs the tests: a second copy would take minutes.
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return python
