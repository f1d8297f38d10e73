"""Models of several widths, for the tests of what they do, and of how they are exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynnet import DynamicModel, GateConfig
from dynnet.gates.routers import Routers
from tests.cases import CASES, Case

WIDTHS = (0.3, 0.6, 1.0)
FIXED = {"test_nfnet", "test_mambaout"}  # nothing in them can change its width from sample to sample
ABLE = [case for case in CASES if case.name not in FIXED]
SOME = [case for case in ABLE if case.name in {"cifar_resnet20", "test_vit", "test_efficientnet"}]
MORE = [case for case in ABLE if case.name in {"regnetx_002", "test_convnext", "efficientvim_m1", "densenet121"}]


def routed(case: Case) -> tuple[DynamicModel, Routers, Tensor]:
    """A model whose routers disagree on six images, which are given too, and whose norms remember much."""
    model = case.wrapped(gates=GateConfig(unit=2, widths=WIDTHS))
    gates = model.gates
    assert isinstance(gates, Routers)
    for module in model.backbone.modules():
        if getattr(module, "running_var", None) is not None:
            _scatter(module.running_mean, module.running_var)
    for norm in gates.norms:
        _scatter(norm.mean, norm.var)
    images = case.images(6)
    for number, region in enumerate(gates.plan.regions):
        router: nn.Module = gates.networks[number]
        nn.init.normal_(router.logits.weight, 0, 5.0)
        decisions = model.forward_exits(images).decisions
        assert decisions is not None
        with torch.no_grad():  # so that no width is the best for all
            router.logits.bias -= decisions.taken[number].logits.mean(0)
        assert len(region.widths) == len(WIDTHS)
    return model, gates, images


def _scatter(mean: Tensor, var: Tensor) -> None:
    mean.normal_(0, 0.2)
    var.uniform_(0.5, 2)


def widths_taken(model: DynamicModel, images: Tensor) -> list[list[int]]:
    """By region, the width of each image."""
    decisions = model.forward_exits(images).decisions
    assert decisions is not None
    return [decisions.taken[number].logits.argmax(1).tolist() for number in sorted(decisions.taken)]
