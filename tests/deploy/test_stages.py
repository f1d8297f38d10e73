"""A graph that is cut where exits answer says what the model says, bit for bit, also of who stays behind others."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import dynnet
from dynnet.deploy.checks import checked_cut
from dynnet.deploy.stages import staged
from dynnet.errors import ExportError
from tests.cases import CASES, Case, tiny

# Convolutions; tokens, whose class token is made anew; two branches; sizes that are noted before an exit.
NAMES = ("cifar_resnet20", "test_vit", "test_convnext")
MORE = ("crossvit_9_240", "coat_lite_tiny", "mobilenetv3_small_050")
TRIED = [
    pytest.param(case, marks=[pytest.mark.sweep] * (case.name in MORE)) for case in CASES if case.name in NAMES + MORE
]


@pytest.mark.parametrize("case", TRIED, ids=str)
def test_a_cut_graph_says_what_the_model_says(case: Case) -> None:
    model = dynnet.fold(case.wrapped())
    model.thresholds = [0.5, 0.5]
    stages = staged(model, case.size)
    assert [stage.exit for stage in stages] == [0, 1, 2]
    assert all(stage.takes for stage in stages)
    checked_cut(model, stages, case.images(4))  # bit for bit, and with rows that have left


def test_an_exit_that_is_off_makes_no_cut() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    model.thresholds = [float("inf"), 0.5]
    stages = staged(model, (3, 32, 32))
    assert [stage.exit for stage in stages] == [1, 2]
    held = sum(tensor.numel() for stage in stages for tensor in stage.graph.buffers())
    off = sum(p.numel() for p in model.heads[0].parameters())
    assert held < sum(t.numel() for t in [*model.parameters(), *model.buffers()]) - off + 1


def test_layouts_cross_a_cut() -> None:
    backbone = timm.create_model("test_efficientnet_ln", num_classes=4).eval()  # its norms leave channels last
    model = dynnet.fold(dynnet.wrap(backbone, ["blocks.0", "blocks.1"], input_size=(3, 64, 64)))
    model.thresholds = [0.5, 0.5]
    checked_cut(model, staged(model, (3, 64, 64)), torch.randn(4, 3, 64, 64))


def test_patience_goes_on_from_stage_to_stage() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32), confidence="patience")
    model.thresholds = [0.9, 0.9]
    stages = staged(model, (3, 32, 32))
    checked_cut(model, stages, torch.randn(4, 3, 32, 32))
    confidence = [stage.graph(*given)[1] for stage, given in zip(stages, _fed(stages), strict=True)]
    assert set(confidence[-1].mul(3).round().tolist()) <= {1.0, 2.0, 3.0}
    for head in model.heads:  # all answer the same then
        head.classifier.weight.data.zero_()
        head.classifier.bias.data.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    model.backbone[-1].bias.data.copy_(torch.tensor([99.0, 0.0, 0.0, 0.0]))
    again = staged(model, (3, 32, 32))
    told = [stage.graph(*given)[1] for stage, given in zip(again, _fed(again), strict=True)]
    assert [float(confidence.min()) for confidence in told] == [1 / 3, 2 / 3, 1.0]


def _fed(stages: list, samples: int = 16) -> list[list[Tensor]]:
    live, fed = {stages[0].takes[0].name: torch.randn(samples, 3, 32, 32)}, []
    for stage in stages:
        fed.append([live[value.name] for value in stage.takes])
        live |= {v.name: t for v, t in zip(stage.gives, stage.graph(*fed[-1])[2:], strict=True)}
    return fed


def test_what_mixes_samples_behind_an_exit_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            mean = x.mean(0)  # of all samples
            return self.rest((self.pass_on(x) - mean).mean((2, 3)))

        def pass_on(self, x: Tensor) -> Tensor:
            return x

    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    model.thresholds = [0.5]
    model.backbone[1].register_forward_hook(lambda m, a, out: out - out.mean(0))
    with pytest.raises(ExportError, match="get another answer at exit 1|cannot leave it one by one"):
        checked_cut(model, staged(model, (3, 32, 32)), torch.randn(4, 3, 32, 32))


def test_what_torch_cannot_export_is_told() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    model.backbone[1].register_forward_hook(lambda m, a, out: out if not out.is_meta and out.sum() > 0 else -out)
    with pytest.raises(ExportError, match="torch.export cannot take the model: .*data-dependent|Could not guard"):
        staged(model, (3, 32, 32))
    assert timm.is_model("cifar_resnet20")
