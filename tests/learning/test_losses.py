"""What training minimises."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import dynnet
from dynnet.cost.ledger import Ledger, Segment
from dynnet.errors import RecipeError
from dynnet.exits.confidence import make_measure
from dynnet.learning.losses import (
    BudgetConfig,
    LossConfig,
    budget_loss,
    distillation,
    exit_losses,
    exit_weights,
    expected_macs,
    gate_noise,
)
from tests.cases import tiny


def test_weights_grow_along_the_ramp() -> None:
    config = LossConfig(weights=(0.2, 0.8), ramp=0.5)
    assert exit_weights(config, [0.3, 0.6], 0.0) == pytest.approx((0.01, 0.01))
    assert exit_weights(config, [0.3, 0.6], 0.25) == pytest.approx((0.105, 0.405))
    assert exit_weights(config, [0.3, 0.6], 0.5) == pytest.approx((0.2, 0.8))
    assert exit_weights(config, [0.3, 0.6], 1.0) == pytest.approx((0.2, 0.8))
    assert exit_weights(LossConfig(weights="depth"), [0.3, 0.6], 0.1) == pytest.approx((0.3, 0.6))
    assert exit_weights(LossConfig(weights="equal"), [0.3, 0.6], 0.1) == pytest.approx((1, 1))
    with pytest.raises(RecipeError, match=r"loss.weights has 1 numbers for 2 exits"):
        exit_weights(LossConfig(weights=(1.0,)), [0.3, 0.6], 0.1)


def test_the_final_exit_teaches_and_is_not_taught() -> None:
    logits = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
    target = torch.randint(0, 4, (6,))
    losses = exit_losses(logits, target, LossConfig(distill=0.3, temperature=2.0))
    expected = 0.7 * F.cross_entropy(logits[0], target) + 0.3 * distillation(logits[0], logits[1].detach(), 2.0)
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(losses[1], F.cross_entropy(logits[1], target))
    (gradient,) = torch.autograd.grad(losses[0], logits[1])
    assert not gradient.any()


def test_distillation_is_zero_for_equals_and_scales_with_temperature() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    assert distillation(x, x, 3.0).item() == pytest.approx(0, abs=1e-6)
    p, q = F.softmax(y / 2, 1), F.softmax(x / 2, 1)
    assert distillation(x, y, 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-4)


def test_soft_targets_are_understood() -> None:
    logits = [torch.randn(3, 4)]
    hard, soft = torch.tensor([0, 1, 2]), torch.eye(4)[:3]
    config = LossConfig(distill=0.0)
    torch.testing.assert_close(exit_losses(logits, hard, config), exit_losses(logits, soft, config))


def test_gradient_equilibrium_scales_what_comes_back_and_nothing_else() -> None:
    """Li et al. 2019: 1/(n - i) into head i, (n - i - 1)/(n - i) onward, for n classifiers counted from 0."""
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    first = model.backbone[0][0].weight

    def gradients(equilibrium: bool) -> list[torch.Tensor]:
        logits = model.forward_exits(x, equilibrium).logits
        return [torch.autograd.grad(y.square().sum(), first, retain_graph=True)[0] for y in logits]

    plain, scaled = gradients(False), gradients(True)
    for i, factor in enumerate((1 / 3, 2 / 3 * 1 / 2, 2 / 3 * 1 / 2)):
        torch.testing.assert_close(scaled[i], plain[i] * factor)
    for a, b in zip(model.forward_exits(x, True).logits, model.forward_exits(x).logits, strict=True):
        assert torch.equal(a, b)


def test_a_backbone_that_goes_on_in_place_can_be_trained() -> None:
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace=True), torch.nn.Conv2d(8, 8, 3),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4),
    )  # fmt: skip
    model = dynnet.wrap(backbone, ["0"], input_size=(3, 16, 16)).train()
    sum(y.sum() for y in model(torch.randn(2, 3, 16, 16)).logits).backward()


LEDGER = Ledger((Segment(60, 10), Segment(40)), {})
CONFIDENCE = make_measure("max_probability", 1)


def test_expected_macs_follow_the_probability_of_leaving() -> None:
    config = BudgetConfig(leave_at=0.9, sharpness=0.01)
    sure, unsure = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    expected = expected_macs((torch.stack([sure, unsure]), torch.zeros(2, 2)), None, LEDGER, config, CONFIDENCE)
    assert expected.tolist() == pytest.approx([70.0, 110.0], abs=0.1)
    gated = torch.tensor([[-30.0, -20.0], [-30.0, -20.0]])
    saved = expected_macs((torch.stack([sure, unsure]), torch.zeros(2, 2)), gated, LEDGER, config, CONFIDENCE)
    assert saved.tolist() == pytest.approx([40.0, 60.0], abs=0.1)
    # A sample that is closer to leaving is cheaper, and the gradient says so.
    logits = torch.tensor([[1.2, 0.0]], requires_grad=True)
    expected_macs((logits, torch.zeros(1, 2)), None, LEDGER, BudgetConfig(), CONFIDENCE).sum().backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


def test_the_budget_loss_is_zero_on_target_and_bounds_relax() -> None:
    config = BudgetConfig(target=0.5, weight=2.0, ramp=0.0, relax=0.5)

    def loss(macs: float, rates: list[float], progress: float) -> float:
        return budget_loss(torch.tensor(float(macs)), 100.0, torch.tensor(rates), config, progress).item()

    assert loss(50, [0.5, 0.5], 0.0) == 0
    assert loss(70, [0.5, 0.5], 0.0) == pytest.approx(2 * 0.2**2)
    assert loss(50, [0.9, 0.1], 0.0) == pytest.approx(2 * 0.4**2)
    assert loss(50, [0.9, 0.1], 0.25) == pytest.approx(2 * 0.15**2)
    assert loss(50, [0.9, 0.1], 0.5) == 0
    # The target falls from 1.
    falling = BudgetConfig(target=0.5, weight=1.0, ramp=0.5, relax=0.0)
    assert budget_loss(torch.tensor(75.0), 100.0, torch.ones(1), falling, 0.25).item() == 0


def test_noise_fades_before_the_end() -> None:
    config = BudgetConfig(quiet=0.2)
    assert [gate_noise(config, p) for p in (0.0, 0.4, 0.8, 0.9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert gate_noise(BudgetConfig(quiet=1.0), 0.0) == 0
