"""Gradients are right in channels_last, on every processor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynnet
from dynnet.backbone.batches import Batches
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.channels.finding import find_groups
from dynnet.gates.plan import GateConfig
from dynnet.pruning.criteria.units import score
from dynnet.pruning.criteria.weights import score_weights
from tests.cases import open_at_random
from training import prune, train

LAST = torch.channels_last
ROOT = Path(__file__).parents[2]


@pytest.mark.sweep
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_narrow_networks_are_right_without_avx512(threads: int) -> None:
    # oneDNN then takes its kernels for AVX2, also on processors that could do more.
    command = [sys.executable, "-m", "tests.gradients", str(threads), "1"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert len(ended.stdout.splitlines()) == 8 * 2 * 2  # widths, types, layouts


class Watch(TorchDispatchMode):
    """Sees which kernels a backward asks for.

    Attributes:
        strides: of the inputs and weights of convolutions at risk whose weight gradient was computed, with the shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[tuple[torch.Size, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            _, x, weight, _, stride, _, _, transposed, _, groups, wanted = args
            small = weight.shape[1] < 8 and weight.shape[2:].numel() == 1 and max(stride) > 1
            if small and groups == 1 and not transposed and wanted[1]:
                self.strides += [(x.shape, x.stride()), (weight.shape, weight.stride())]
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """There were some, and all were contiguous, to the strides of dimensions of size 1."""
        assert any(shape[1] > 1 for shape, _ in self.strides)  # one channel is the same in both layouts
        for shape, strides in self.strides:
            assert strides == tuple(np.cumprod([1, *reversed(shape[1:])])[::-1]), (shape, strides)


class Permuting(nn.Module):
    """Whatever its memory format, a strided convolution is handed what a linear layer over the last dimension made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 6)
        self.down, self.norm = nn.Conv2d(6, 16, 1, 2), nn.BatchNorm2d(16)
        self.last, self.pool, self.fc = nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)
        self.num_classes = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(self.pool(self.last(self.norm(self.down(x)).relu())).flatten(1))


RECIPE = """
data: {name: digits, crop: 1}
backbone: {name: cifar_resnet20, kwargs: {width: 0.375}}
wrap: {exits: [layer2.0], head_share: 0.1}
channels_last: true
dense: {epochs: 1, batch_size: 512}
heads: {epochs: 1, batch_size: 512}
joint: {epochs: 1, batch_size: 512}
finetune: {epochs: 2, batch_size: 512}
"""


def recipe(folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    return ["--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "run")]


def narrow() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", width=0.25, num_classes=4).to(memory_format=LAST)


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16).to(memory_format=LAST)


def backward_through(model: nn.Module, train: bool = True) -> None:
    outputs = model.train(train).to(memory_format=LAST)(images())
    logits = outputs if isinstance(outputs, Tensor) else torch.stack(outputs.logits)
    logits.square().sum().backward()


def a_loop_of_the_users_own() -> None:
    backward_through(dynnet.wrap(narrow(), ["layer2.0"], head_share=0.1, input_size=(3, 16, 16)))


def a_backbone_that_permutes() -> None:
    backward_through(dynnet.wrap(Permuting(), ["norm"], head_share=0.1, input_size=(3, 16, 16)))


def gates_that_narrow_a_layer_in_eval_mode() -> None:
    torch.manual_seed(3)
    body = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1, 2)]
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    model = dynnet.wrap(backbone, [], gates=GateConfig(unit=1, blocks=1), input_size=(3, 16, 16))
    open_at_random(model, bias=-1e6)  # one unit of every group and image
    assert not at_risk(model)
    backward_through(model, train=False)


def criteria_of_units() -> None:
    model, size = narrow(), (3, 16, 16)
    groups = find_groups(model, size)
    for criterion in ("taylor", "fisher", "hessian"):
        score(model, groups, criterion, Batches([(images(), torch.arange(4))]))


def criteria_of_weights() -> None:
    model = narrow()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    for criterion in ("taylor", "fisher", "hessian"):
        score_weights(model, layers, criterion, Batches([(images(), torch.arange(4))]))


@pytest.mark.parametrize(
    "use",
    [
        a_loop_of_the_users_own,
        a_backbone_that_permutes,
        gates_that_narrow_a_layer_in_eval_mode,
        criteria_of_units,
        criteria_of_weights,
    ],
    ids=lambda use: use.__name__,
)
def test_no_layer_meets_the_kernel_that_is_wrong(use: Callable[[], None]) -> None:
    with Watch() as seen:
        use()
    seen.check()


def test_no_layer_meets_it_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch() as seen:
        assert train.main(recipe(tmp_path)) == 0
    seen.check()
    told = [line for line in capsys.readouterr().out.splitlines() if "not in channels_last" in line]
    assert [line.split(":")[0] for line in told] == ["dense", "joint"]  # no head has such a layer
    assert all(line.endswith("layer2.0.downsample.0") for line in told)


@pytest.mark.parametrize("method", ["l1", "magnitude", "slimming"])
def test_no_layer_meets_it_in_fine_tuning(method: str, tmp_path: Path) -> None:
    options = ["--pruning.method", method, "--pruning.distill", "0.5"]
    options += ["--pruning.multiple", "1"] if method != "magnitude" else []
    with Watch() as seen:
        assert prune.main([*recipe(tmp_path), *options]) == 0
    seen.check()


def test_layers_that_are_right_are_left_alone() -> None:
    assert at_risk(narrow()) == ["layer2.0.downsample.0"]
    assert not at_risk(timm.create_model("cifar_resnet20"))
    safe = [nn.Conv2d(8, 4, 1, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 4, 1, 2, groups=2)]
    assert not at_risk(nn.Sequential(*safe, nn.ConvTranspose2d(4, 4, 1, 2)))
    assert at_risk(nn.Sequential(nn.Conv2d(7, 9, 1, (1, 2)))) == ["0"]
    kept = []
    with right_gradients():
        for layer in (*safe, nn.Conv2d(4, 4, 1, 2).requires_grad_(False), nn.Conv2d(4, 4, 1, 2)):
            x = torch.randn(2, layer.in_channels, 8, 8).to(memory_format=LAST)
            kept.append(layer.to(memory_format=LAST)(x).is_contiguous(memory_format=LAST))
    assert kept == [True] * 5 + [False]


def test_answers_and_gradients_are_those_of_plain_torch() -> None:
    plain, model = narrow().double(), narrow().double()
    x = images().double()
    plain(x).square().sum().backward()
    with right_gradients(at_risk(model)), right_gradients():  # one within another is one
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
