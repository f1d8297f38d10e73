"""Threads fit the work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import dynnet
from dynnet.evaluation import threads
from dynnet.evaluation.threads import fit_threads
from training import train


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of eight threads, where nobody has told how many to take."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_MOST", 8)
    yield
    torch.set_num_threads(before)


def network(width: int) -> nn.Module:
    """Two layers of 1024 x width multiply-adds an image each."""
    return nn.Sequential(nn.Conv2d(1, width, 32), nn.ReLU(), nn.Flatten(), nn.Linear(width, 1024))


@pytest.mark.parametrize(
    ("width", "batch", "expected"),
    [(1, 1, 1), (64, 1, 1), (64, 152, 1), (64, 153, 2), (64, 256, 3), (1024, 128, 8)],
)
def test_a_thread_gets_five_million_multiply_adds_of_a_layer(width: int, batch: int, expected: int) -> None:
    said = fit_threads(network(width), (1, 32, 32), batch)
    assert torch.get_num_threads() == expected
    assert said.startswith(f"{expected} thread")
    assert f"{1024 * width * batch / 1e6:.2f} M multiply-adds a layer in a batch of {batch}" in said


def test_of_a_dynamic_model_the_backbone_counts() -> None:
    backbone = timm.create_model("cifar_resnet20", width=0.25, num_classes=4)
    alone = fit_threads(backbone, (3, 32, 32), 256)
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = dynnet.wrap(backbone, ["layer2.0"], head_share=0.1, input_size=(3, 32, 32)).train()
    assert fit_threads(model, (3, 32, 32), 256) == alone
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_who_says_how_many_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setenv(name, "3")
    assert fit_threads(network(1), (1, 32, 32), 1) == f"3 threads, as {name} says"
    assert torch.get_num_threads() == 3


def test_every_stage_says_what_it_chose(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(8)
    assert train.main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--dense.epochs", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "multiply-adds a layer" in line]
    assert [line.split(":")[0] for line in lines] == ["dense", "heads", "joint"]
    assert all(": 1 thread of 8, " in line for line in lines)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("package", ["training", "eval"])
def test_threads_that_wait_soon_sleep(package: str) -> None:
    def spins(**told: str) -> str:
        environment = {key: value for key, value in os.environ.items() if "OMP" not in key} | told
        code = f"import {package}, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
        command = [sys.executable, "-c", code]
        root = Path(__file__).parents[2]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True).stdout.strip()

    assert spins() == "1000"
    assert spins(GOMP_SPINCOUNT="7") == "7"
    assert spins(OMP_WAIT_POLICY="active") == "None"
