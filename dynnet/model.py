"""A backbone with exits: `DynamicModel`, and what it answers.

B batch, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dynnet.backbone.dry_run import on_meta
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.cost.ledger import Ledger, price
from dynnet.errors import GateError, InputError
from dynnet.exits import flow
from dynnet.exits.calls import Answering, EveryExit
from dynnet.exits.confidence import Measure, active, check_thresholds, make_measure
from dynnet.exits.flow import Tag
from dynnet.exits.rehearsal import Placement
from dynnet.gates import networks as gates
from dynnet.gates.networks import Decisions, Gates
from dynnet.gates.plan import GateConfig, GatePlan

_PRICING = threading.Lock()

Execution = Literal["sparse", "masked"]


class Prediction(NamedTuple):
    """What a batch got, and what it cost.

    Attributes:
        logits: (B, K) of the exit at which each sample left.
        exit: (B,) int64, its number; E is the backbone's own head.
        confidence: (B,) of that exit, in the unit of the model's measure.
        macs: (B,) int64, multiply-adds that ran for the sample; FLOPs are twice as many.
    """

    logits: Tensor
    exit: Tensor
    confidence: Tensor
    macs: Tensor

    @property
    def flops(self) -> Tensor:
        """(B,) int64, 2 x MACs."""
        return 2 * self.macs


class ExitOutputs(NamedTuple):
    """What every exit says of every sample, as in training.

    Attributes:
        logits: E + 1 tensors of (B, K), the backbone's own last.
        decisions: what the gates decided on the way; None without gates.
    """

    logits: tuple[Tensor, ...]
    decisions: Decisions | None = None


@dataclass(frozen=True)
class WrapConfig:
    """All that is needed to wrap an equal backbone in the same way.

    Attributes:
        exits: module names, in running order.
        input_size: (C, H, W) for which fractions, heads and prices were computed.
        head_share: MACs of one head, as a share of the backbone's.
        confidence: name of the measure; "custom" for a callable.
        heads: "fitted", or "custom" for heads of the user's own.
        gates: how channels are gated; None where they are not.
    """

    exits: tuple[str, ...]
    input_size: tuple[int, int, int]
    head_share: float = 0.005
    confidence: str = "max_probability"
    heads: str = "fitted"
    gates: GateConfig | None = None


class DynamicModel(nn.Module):
    """A timm model that answers each sample as early as its confidence allows. Made by `dynnet.wrap`.

    In eval mode `model(x)` gives (B, K) logits, as the backbone does; `model.predict(x)` also tells exits, confidence
    and MACs. In train mode `model(x)` gives `ExitOutputs`.

    Attributes:
        backbone: as it came, with hooks on its boundaries.
        heads: one for each exit.
        gates: the gate networks, and what they switch; None without gates.
        config: how it was wrapped.
        boundaries: where the exits stand.
        num_classes: K.
        calibration: what the thresholds were fitted on and for, as `dynnet.calibrate` reports it; None if set by hand.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module],
        placement: Placement,
        config: WrapConfig,
        num_classes: int,
        confidence: str | Callable[[Tensor], Tensor],
        plan: GatePlan | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.gates = None if plan is None else Gates(plan)
        self._execution: Execution = "sparse"
        self.boundaries = placement.exits
        self.config = config
        self.num_classes = num_classes
        self.measure: Measure = make_measure(confidence, len(self.boundaries))
        self.calibration: dict[str, Any] | None = None
        self._thresholds = (float("inf"),) * len(self.boundaries)
        gated = () if plan is None else {f"backbone.{site.layer}" for site in plan.sites if site.reads is not None}
        self._at_risk = at_risk(self, gated)  # looked up once: a wrapped model is not cut
        self._ledgers: dict[tuple[int, ...], Ledger] = {}
        # In a tuple, so that it is no submodule.
        self._shadow: tuple[DynamicModel] | None = None
        self._unwrapped = False
        self._dtype: torch.dtype | None = None  # of the backbone, when last looked up
        self.tag = Tag()
        self._notes_size = placement.notes_size
        self.train(backbone.training)

    @property
    def exits(self) -> tuple[str, ...]:
        """Module names of the E exits."""
        return self.config.exits

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each exit: a sample leaves where its confidence >= the threshold; inf never, -inf always.

        At inf an exit is switched off: its head does not run and costs nothing (except under "patience", where every
        exit's vote counts).
        """
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        self._thresholds = check_thresholds(values, self.exits)
        self.calibration = None

    @property
    def execution(self) -> Execution:
        """ "sparse": channels that gates close are not computed. In a batch, where every image has a mask of its own,
        what is open for one is computed for all, and set to zero where it is closed. "masked": everything is computed
        and set to zero, the reference.
        """
        return self._execution

    @execution.setter
    def execution(self, value: Execution) -> None:
        if value not in get_args(Execution):
            raise GateError(f"execution={value!r}: choose from {', '.join(get_args(Execution))}")
        self._execution = value

    @property
    def remembers(self) -> bool:
        """Does the measure need every exit's vote, so that all heads run whatever the thresholds?"""
        return self.config.confidence == "patience"

    @property
    def active(self) -> tuple[bool, ...]:
        """Which heads run at the present thresholds."""
        return tuple(active(self.thresholds, self.remembers))

    def forward(self, x: Tensor, equilibrium: bool = False, gated: bool = True) -> Tensor | ExitOutputs:
        """Answer a batch.

        Args:
            x: (B, C, H, W) float images.
            equilibrium, gated: in train mode, see `forward_exits`.

        Returns:
            In eval mode (B, K) logits, each sample's from the exit at which it left; in train mode all exits' logits.
        """
        if self.training:
            return self.forward_exits(x, equilibrium, gated)
        return self._answer(x).logits()

    def forward_exits(self, x: Tensor, equilibrium: bool = False, gated: bool = True) -> ExitOutputs:
        """The logits of every exit for every sample; nobody leaves.

        Args:
            x: (B, C, H, W) float images.
            equilibrium: scale gradients so that every part of the backbone feels the exits behind it evenly (Li et al.,
                "Improved Techniques for Training Adaptive Deep Networks", https://arxiv.org/abs/1908.06294).
            gated: let the gates decide; else all channels are computed.
        """
        self._check(x)
        if torch.is_grad_enabled() and getattr(self.backbone, "grad_checkpointing", False):
            raise InputError(
                "gradient checkpointing runs blocks a second time, and their exits with them; switch it off with "
                "backbone.set_grad_checkpointing(False)"
            )
        with right_gradients(_learns(x) and self._at_risk):
            return self.run_every_exit(x, equilibrium, gated)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Prediction:
        """Answer a batch, and tell for each sample where it left and what it cost.

        Args:
            x: (B, C, H, W) float images.

        Raises:
            InputError: the model is in train mode, or the images do not fit it.
        """
        if self.training:
            raise InputError("predict() answers in eval mode; call model.eval() first")
        answers = self._answer(x)
        exits = answers.exits().to(x.device)
        ledger = self.ledger(tuple(x.shape[1:]))
        macs = ledger.bill(self.active).to(x.device)[exits]
        if answers.decisions is not None:
            macs = macs + answers.decisions.price(ledger, len(x)).sum(1)
        return Prediction(answers.logits(), exits, answers.confidence(), macs)

    def ledger(self, input_size: tuple[int, ...] | None = None) -> Ledger:
        """Prices of segments and heads for one sample of (C, H, W); by default of the size it was wrapped for."""
        size = tuple(input_size or self.config.input_size)
        if size not in self._ledgers:
            # On a copy without numbers: a dry run swaps parameters, and other threads may be using these.
            with _PRICING:
                if self._shadow is None:
                    with on_meta(self):
                        self._shadow = (copy.deepcopy(self),)
                (shadow,) = self._shadow
                sites = () if self.gates is None else self.gates.plan.sites
                self._ledgers[size] = price(shadow, shadow.run_every_exit, size, self.exits, sites)
        return self._ledgers[size]

    def floor(self) -> int:
        """The fewest MACs that a sample can cost: it leaves at the first exit, all gates but one a group closed."""
        ledger = self.ledger()
        least = [0] * len(ledger.segments) if self.gates is None else self.gates.least(ledger)
        return ledger.segments[0] + least[0] + (ledger.heads[0] if self.exits else 0)

    def unwrap(self) -> nn.Module:
        """Take the hooks away and return the backbone as it came. This model cannot be used afterwards."""
        flow.detach(self.backbone)
        gates.detach(self.backbone)
        self._unwrapped = True
        return self.backbone

    def no_weight_decay(self) -> set[str]:
        """Parameters to be spared (timm's optimisers ask): position embeddings and the like, and gates."""
        own = getattr(self.backbone, "no_weight_decay", None)
        spared = {f"backbone.{name}" for name in own()} if callable(own) else set()
        # Decay would draw logits to zero, where gates are open by chance.
        return spared | {name for name, _ in self.named_parameters() if name.startswith("gates.")}

    def _apply(self, fn: Any, recurse: bool = True) -> DynamicModel:
        self._dtype = None  # `.half()` and the like come through here
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"exit {i} at {b.name} ({b.share:.0%} of MACs)" for i, b in enumerate(self.boundaries))

    def run_every_exit(self, x: Tensor, equilibrium: bool = False, gated: bool = False) -> ExitOutputs:
        """`forward_exits` without its checks; also without gates, for dry runs."""
        decisions = self._decisions(sparse=False) if gated else None
        every = EveryExit(self.tag, len(x), decisions, list(self.heads), equilibrium)
        with flow.run(every, self._notes_size):
            every.logits.append(self.backbone(x))
        return ExitOutputs(tuple(every.logits), every.decisions)

    def _decisions(self, sparse: bool) -> Decisions | None:
        return None if self.gates is None else Decisions(self.gates, sparse)

    def _answer(self, x: Tensor) -> Answering:
        self._check(x)
        decisions = self._decisions(sparse=self.execution == "sparse")
        answers = Answering(self.tag, len(x), decisions, list(self.heads), self.measure, self.thresholds, self.active)
        with right_gradients(_learns(x) and self._at_risk), flow.run(answers, self._notes_size):
            answers.finish(self.backbone(x))
        return answers

    def _check(self, x: Tensor) -> None:
        if self._unwrapped:
            raise InputError("this model was unwrapped; call dynnet.wrap on the backbone again")
        channels = self.config.input_size[0]
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"got {got}; expected float images of shape (B, {channels}, H, W), normalised")
        if len(x) == 0:
            raise InputError("got an empty batch; give at least one image")
        if x.dtype != self._dtype:  # looking it up costs as much as an operator
            self._dtype = next((p.dtype for p in self.backbone.parameters()), x.dtype)
            if x.dtype != self._dtype and not torch.is_autocast_enabled(x.device.type):
                raise InputError(
                    f"got images of {x.dtype} for a model of {self._dtype}; convert with x.to({self._dtype})"
                )
        if tuple(x.shape[1:]) not in self._ledgers:
            self.ledger(tuple(x.shape[1:]))  # a dry run, which tells in words where a size does not fit


def _learns(x: Tensor) -> bool:
    """May gradients be asked for, and computed on a CPU?"""
    return torch.is_grad_enabled() and x.device.type == "cpu"
