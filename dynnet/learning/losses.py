"""What training minimises. B batch, K classes, E exits.

    loss = CE(final) + sum_i w_i * ((1 - a) * CE(exit_i) + a * T^2 * KL(final || exit_i))

The weights w_i are fixed, or grow from 0.01 over the first part of training (Kaya et al., "Shallow-Deep Networks",
https://arxiv.org/abs/1810.07052), so that early exits do not disturb features that are still forming. The second term
lets exits learn from the final one (Phuong & Lampert, "Distillation-Based Training for Multi-Exit Architectures",
2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dynnet.cost.ledger import Ledger
from dynnet.errors import InputError, RecipeError
from dynnet.exits.confidence import Measure
from dynnet.learning.limits import check_limits
from dynnet.outputs import ExitOutputs


@dataclass(frozen=True)
class LossConfig:
    """How exits are weighed and taught.

    Attributes:
        weights: "equal" (1 each), "depth" (the share of the MACs at the exit), or a number for each exit.
        ramp: share of the joint stage over which the weights grow from 0.01 to their value.
        distill: a, the part of an exit's loss that comes from the final exit.
        temperature: T of the distillation.
        equilibrium: scale gradients by the number of exits behind (see `DynamicModel.forward_exits`).
        label_smoothing: of the cross-entropy.
    """

    weights: Literal["equal", "depth"] | tuple[float, ...] = "depth"
    ramp: float = 0.0
    distill: float = 0.3
    temperature: float = 2.0
    equilibrium: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_limits(self, "loss")


@dataclass(frozen=True)
class BudgetConfig:
    """How gates are made to save compute: a penalty on the expected MACs of the whole dynamic inference.

    Attributes:
        target: expected MACs, as a share of the backbone's.
        weight: lambda of the penalty.
        ramp: share of the joint stage over which the target falls from 1 to its value.
        relax: share of the joint stage over which the bounds on every region's open rate widen from the target to
            [0, 1]; without them a few regions would be closed for good before the others have learnt anything.
        leave_at: confidence around which a sample is expected to leave an exit, before thresholds are fitted.
        sharpness: width of that step, in units of confidence.
        quiet: last share of the joint stage, without noise on the gates.
    """

    target: float = 0.5
    weight: float = 8.0
    ramp: float = 0.2
    relax: float = 1 / 3
    leave_at: float = 0.9
    sharpness: float = 0.05
    quiet: float = 0.2

    def __post_init__(self) -> None:
        check_limits(self, "budget")


def exit_weights(config: LossConfig, shares: Sequence[float], progress: float) -> tuple[float, ...]:
    """w_i at a moment of training.

    Args:
        config: how exits are weighed.
        shares: of the backbone's MACs spent at each of the E exits.
        progress: of the stage, in [0, 1].

    Raises:
        RecipeError: the weights are not one for each exit.
    """
    if config.weights == "equal":
        weights = [1.0] * len(shares)
    elif config.weights == "depth":
        weights = list(shares)
    else:
        weights = [float(w) for w in config.weights]
    if len(weights) != len(shares):
        raise RecipeError(f"loss.weights has {len(weights)} numbers for {len(shares)} exits; give one for each exit")
    grown = 1.0 if config.ramp <= 0 else min(1.0, progress / config.ramp)
    return tuple(0.01 + (w - 0.01) * grown for w in weights)


def loss(outputs: ExitOutputs, target: Tensor, config: LossConfig | None = None, progress: float = 1.0) -> Tensor:
    """What training minimises: the final classifier's loss, and those of the exits, weighted and taught.

    >>> import timm, torch, dynnet
    >>> model = dynnet.wrap(timm.create_model("cifar_resnet20"), exits=["layer1"]).train()
    >>> outputs = model(torch.randn(8, 3, 32, 32))
    >>> loss(outputs, torch.randint(10, (8,))).backward()

    Args:
        outputs: of a wrapped model in train mode; of one whose backbone is frozen, too.
        target: (B,) classes or (B, K) probabilities.
        config: how exits are weighed and taught; by default as in the zoo.
        progress: of the training, in [0, 1], for weights that grow.

    Returns:
        A scalar. The budget of gates is no part of it, see `budget_loss`.

    Raises:
        RecipeError: the weights are not one for each exit.
        InputError: these are no outputs of a wrapped model in train mode.
    """
    if not isinstance(outputs, ExitOutputs):
        raise InputError(
            f"got a {type(outputs).__name__}, not what every exit says; call model.train() before model(images)"
        )
    config = config or LossConfig()
    losses = exit_losses(outputs.logits, target, config)
    return joint_loss(losses, exit_weights(config, outputs.macs_shares, progress))


def joint_loss(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """The sum of (E + 1,) losses: the final one whole, those of the exits by E weights."""
    return losses[-1] + (losses[:-1] * losses.new_tensor(weights)).sum()


def exit_losses(logits: Sequence[Tensor], target: Tensor, config: LossConfig) -> Tensor:
    """The loss of each classifier, unweighted.

    Args:
        logits: E + 1 tensors (B, K), the final one last.
        target: (B,) classes or (B, K) probabilities.

    Returns:
        (E + 1,) mean losses over the batch; the last is the final classifier's cross-entropy.
    """
    teacher = logits[-1].detach().float()
    losses = []
    for i, student in enumerate(logits):
        loss = F.cross_entropy(student.float(), target, label_smoothing=config.label_smoothing)
        if config.distill and i < len(logits) - 1:
            loss = (1 - config.distill) * loss + config.distill * distillation(student, teacher, config.temperature)
        losses.append(loss)
    return torch.stack(losses)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened (B, K) logits, mean over the batch (https://arxiv.org/abs/1503.02531)."""
    log_p = F.log_softmax(student.float() / temperature, 1)
    log_q = F.log_softmax(teacher.float() / temperature, 1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def gate_noise(config: BudgetConfig, progress: float) -> float:
    """Scale of the noise on the gates: falls from 1 to 0, and stays there for the quiet part of the stage.

    It fades: gates that were open half of the time by chance would all open at once if it stopped.
    """
    loud = 1 - config.quiet
    return max(0.0, 1 - progress / loud) if loud > 0 else 0.0


def expected_macs(
    logits: Sequence[Tensor], gated: Tensor | None, ledger: Ledger, config: BudgetConfig, measure: Measure
) -> Tensor:
    """(B,) expected MACs of every sample: what each segment and head costs, times the probability of reaching it.

    Args:
        logits: E + 1 tensors (B, K).
        gated: (B, E + 1) what gates add to the segments (`Decisions.price`); None without gates.
        ledger: prices of segments and heads.
        config: where samples are expected to leave.
        measure: of confidence, as the model decides by.
    """
    segments = torch.tensor([s.macs for s in ledger.segments], dtype=torch.float32, device=logits[0].device)
    costs = segments.expand(len(logits[0]), -1) if gated is None else segments + gated
    reaches = torch.ones(len(logits[0]), device=logits[0].device)
    total = torch.zeros_like(reaches)
    memory = None
    for i, exit in enumerate(logits[:-1]):
        total = total + reaches * (costs[:, i] + ledger.heads[i])
        confidence, memory = measure(exit.float(), memory)
        reaches = reaches * (1 - ((confidence.float() - config.leave_at) / config.sharpness).sigmoid())
    return total + reaches * costs[:, -1]


def budget_loss(expected: Tensor, dense: float, rates: Tensor, config: BudgetConfig, progress: float) -> Tensor:
    """lambda * ((mean MACs / dense - target)^2 + mean over regions of (open rate outside its bounds)^2).

    After DGNet (Li et al., ICCV 2021): the bounds keep every region near the target at first, and let go.

    Args:
        expected: scalar, mean expected MACs of the batch.
        dense: MACs of the bare backbone.
        rates: (R,) open rates of the regions.
        config: target and weights.
        progress: of the stage, in [0, 1].
    """
    target = 1 - (1 - config.target) * (min(1.0, progress / config.ramp) if config.ramp > 0 else 1.0)
    slack = min(1.0, progress / config.relax) if config.relax > 0 else 1.0
    low, high = target * (1 - slack), target + (1 - target) * slack
    outside = (low - rates).clamp(min=0) + (rates - high).clamp(min=0)
    return config.weight * ((expected / dense - target).square() + outside.square().mean())
