"""The package as users get it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import dynnet
from dynnet import zoo
from dynnet.errors import CheckpointError

ROOT = Path(__file__).parent.parent


def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Built, installed in a fresh environment, and a zoo model loaded from it."""
    program = (
        "import dynnet, torch; m = dynnet.create_model('digits'); "
        "print(dynnet.__file__, m.predict(torch.zeros(1, *m.input_size)).logits.shape)"
    )
    done = subprocess.run([installed, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(str(installed.parents[1])), done.stderr
    assert done.stdout.strip().endswith("torch.Size([1, 10])")


@pytest.mark.sweep
def test_a_program_that_uses_every_public_name_is_typed_and_runs(installed: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "example.py", tmp_path)
    used = (tmp_path / "example.py").read_text()
    assert all(name in used for name in dynnet.__all__)
    typed = [installed, "-m", "mypy", "--strict", "--python-executable", installed, "example.py"]
    for command in (typed, [installed, "example.py"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_editable_install_shows_the_package_alone(tmp_path: Path) -> None:
    names = "('training', 'eval', 'tests')"
    code = f"import dynnet, importlib.util as u; assert dynnet.__version__; print([u.find_spec(n) for n in {names}])"
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout.strip() == "[None, None, None]", told.stdout + told.stderr


def test_the_zoo_keeps_what_it_promises() -> None:
    assert "digits" in dynnet.list_models()
    for name in dynnet.list_models():
        model, results = dynnet.create_model(name), zoo.results(name)
        assert [*model.exits, "end"] == [exit["name"] for exit in results["exits"]]
        assert model.ledger().dense == results["dense_macs"]
        assert (zoo.folder() / name / "recipe.yaml").is_file()
        assert (zoo.folder() / name / "README.md").is_file()
        assert (zoo.folder() / name / "model.safetensors").stat().st_size < 10_000_000


def test_the_digits_model_gives_its_published_figures() -> None:
    from dynnet.learning.data import load_data
    from dynnet.learning.recipes import read_recipe

    recipe = read_recipe(zoo.folder() / "digits" / "recipe.yaml")
    model, results = dynnet.create_model("digits"), zoo.results("digits")
    measured = dynnet.measure(model, load_data(recipe.data).loader("test", 64))
    assert measured.accuracy == pytest.approx(results["accuracy"], abs=0.003)
    assert measured.macs.mean() == pytest.approx(results["mean_macs"], rel=0.01)
    assert measured.accuracy >= results["dense_accuracy"] - 0.005
    assert measured.macs_share <= 0.6


def test_unknown_zoo_models_are_told() -> None:
    with pytest.raises(CheckpointError, match="the zoo has no model 'digit'; did you mean 'digits'"):
        dynnet.create_model("digit")


@pytest.mark.parametrize(("depth", "mmacs"), [(20, 41), (32, 69), (44, 98), (56, 126), (110, 254)])
def test_cifar_resnets_are_the_papers(depth: int, mmacs: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"cifar_resnet{depth}")
    assert dynnet.wrap(model, 1).ledger().dense / 1e6 == pytest.approx(mmacs, abs=1)
    layers = [m for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    shortcuts = [n for n, m in model.named_modules() if n.endswith("downsample.0")]
    assert len(layers) - len(shortcuts) == depth


def test_cifar_resnets_behave_like_timms() -> None:
    model = timm.create_model("cifar_resnet20", width=2.0, in_chans=1, num_classes=5, drop_rate=0.1)
    x = torch.randn(2, 1, 32, 32)
    assert model.get_classifier() is model.fc
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 128)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    features = timm.create_model("cifar_resnet20", features_only=True)
    assert [tuple(f.shape[1:]) for f in features(torch.randn(1, 3, 32, 32))] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
