"""A backbone with exits: `DynamicModel`, and what it answers.

B batch, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dynnet.backbone.chain import exits_before
from dynnet.backbone.dry_run import BATCH, Trace, trace
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.backbone.host import Hosted, Preparation, preparation_of, prepare_
from dynnet.belongings import Belongings
from dynnet.config import WrapConfig
from dynnet.cost.ledger import Ledger, price
from dynnet.errors import ForwardError, GateError, InputError
from dynnet.exits import flow
from dynnet.exits.calls import Answering, EveryExit
from dynnet.exits.confidence import Measure
from dynnet.exits.flow import Flow, Tag
from dynnet.exits.noted_sizes import Line, NotedSizes
from dynnet.exits.rehearsal import Placement, lines_at
from dynnet.exits.sizes import Size, Sizes
from dynnet.exits.threshold import check_thresholds, to_json
from dynnet.gates import attaching
from dynnet.gates.decisions import Decisions, least_macs
from dynnet.gates.plan import GatePlan
from dynnet.gates.routers import gates_of
from dynnet.gates.routing import decisions_of
from dynnet.outputs import ExitOutputs, Prediction, only_logits

Execution = Literal["sparse", "masked"]

STATE = "_extra_state"  # the key under which torch keeps in a state_dict what a model says besides its weights
_RENAMED = {"active": "running", "remembers": "measure.every_vote"}


class DynamicModel(Hosted):
    """A timm model that answers each sample as early as its confidence allows. Made by `dynnet.wrap`.

    In eval mode `model(x)` gives (B, K) logits, as the backbone does; `model.predict(x)` also tells exits, confidence
    and MACs. In train mode `model(x)` gives `ExitOutputs`. What timm's tools ask of a model, the backbone answers.
    Thresholds, the preparation of images and the names of classes travel with copies, `state_dict` and files.

    Attributes:
        backbone: as it came, with hooks on its boundaries.
        heads: one for each exit.
        gates: the gate networks, and what they switch; None without gates.
        config: how it was wrapped, with names of exits and the size of images.
        input_size: (C, H, W) for which it was wrapped.
        boundaries: where the exits stand.
        num_classes: K.
        measure: of confidence.
        calibration: what the thresholds were fitted on and for, as `dynnet.calibrate` reports it; None if set by hand.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module],
        placement: Placement,
        config: WrapConfig,
        num_classes: int,
        measure: Measure,
        plan: GatePlan | None = None,
    ) -> None:
        super().__init__()
        assert config.input_size is not None
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.gates = None if plan is None else gates_of(plan, backbone)
        self._execution: Execution = "sparse"
        self.boundaries = placement.exits
        self.config = config
        self.input_size = config.input_size
        self.num_classes = num_classes
        self.measure = measure
        self.calibration: dict[str, Any] | None = None
        self._thresholds = (float("inf"),) * len(self.boundaries)
        gated = () if plan is None else {f"backbone.{site.layer}" for site in plan.sites if site.reads is not None}
        self._at_risk = at_risk(self, gated)  # looked up once: a wrapped model is not cut
        self._sizes = Sizes()
        self._unwrapped = False
        self._dtype: torch.dtype | None = None  # of the backbone, when last looked up
        self.tag = Tag()
        self._notes = bool(placement.noted)  # are there sizes to be corrected?
        # Modules of the backbone keep the modes in which they came: some may be frozen.
        self.training = backbone.training
        for own in (self.heads, self.gates):
            if own is not None:
                own.train(backbone.training)

    @property
    def exits(self) -> tuple[str, ...]:
        """Module names of the E exits."""
        return tuple(boundary.name for boundary in self.boundaries)

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
    def running(self) -> tuple[bool, ...]:
        """Which heads run at the present thresholds."""
        return tuple(self.measure.running(self.thresholds))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """K names, where the model knows them: `label_names` of the backbone's `pretrained_cfg`."""
        return preparation_of(self.backbone).get("label_names")

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
        return self._answer(x)[0].logits()

    def forward_exits(self, x: Tensor, equilibrium: bool = False, gated: bool = True) -> ExitOutputs:
        """The logits of every exit for every sample; nobody leaves.

        Args:
            x: (B, C, H, W) float images.
            equilibrium: scale gradients so that every part of the backbone feels the exits behind it evenly (Li et al.,
                "Improved Techniques for Training Adaptive Deep Networks", https://arxiv.org/abs/1908.06294).
            gated: let the gates decide; else all channels are computed.
        """
        self.check(x)
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
        answers, decisions = self._answer(x)
        exits = answers.exits().to(x.device)
        ledger = self.ledger(tuple(x.shape[1:]))
        macs = ledger.bill(self.running).to(x.device)[exits]
        if decisions is not None:
            macs = macs + decisions.price(ledger, len(x)).sum(1)
        return Prediction(answers.logits(), exits, answers.confidence(), macs)

    def ledger(self, input_size: tuple[int, ...] | None = None) -> Ledger:
        """Prices of segments and heads for one sample of (C, H, W); by default of the size it was wrapped for."""
        return self._of_size(tuple(input_size or self.input_size)).ledger

    def _of_size(self, size: tuple[int, ...]) -> Size:
        found = self._sizes.get(size)
        if found is None:
            try:
                seen = trace(self, size, BATCH, DynamicModel.run_every_exit)
                noted = lines_at(self, size) if self._notes else frozenset()
            except ForwardError as error:
                raise InputError(f"the model cannot take images of size {size}: {error}") from error
            found = self.learn_size(size, seen, noted)
        return found

    def learn_size(self, size: tuple[int, ...], seen: Trace, noted: frozenset[Line]) -> Size:
        """Know images of a size from a dry run in which all heads answered, and where sizes of the batch were noted."""
        plan = None if self.gates is None else self.gates.plan
        switches, deciders = ((), ()) if plan is None else (plan.switches(), plan.deciders())
        first = exits_before(self.backbone, self.exits)
        found = Size(price(seen, self.exits, switches, deciders, first), noted)
        self._sizes.put(size, found)
        return found

    def floor(self) -> int:
        """The fewest MACs that a sample can cost: it leaves at the first exit, all gates but one a group closed."""
        ledger = self.ledger()
        first = ledger.segments[0]
        return first.macs + first.head + (0 if self.gates is None else least_macs(self.gates, ledger)[0])

    def unwrap(self) -> nn.Module:
        """Take the hooks away and return the backbone as it came. This model cannot be used afterwards."""
        flow.detach(self.backbone)
        attaching.detach(self.backbone)
        self._unwrapped = True
        return self.backbone

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Put it on the Hugging Face Hub, from where `dynnet.load("hf-hub:OWNER/NAME")` takes it; see
        `dynnet.files.publishing.push_to_hub`, which also takes plain models."""
        # By name: what is saved is made of models, and so stands below them in the house.
        return cast(str, importlib.import_module("dynnet.files.publishing").push_to_hub(self, repo, **options))

    def no_weight_decay(self) -> set[str]:
        """The backbone's, and gates: decay would draw logits to zero, where gates are open by chance."""
        gates = {name for name, _ in self.named_parameters() if name.startswith("gates.")}
        return super().no_weight_decay() | gates

    def get_extra_state(self) -> Tensor:
        """What belongs to the model besides its weights."""
        thresholds = tuple(to_json(t) for t in self.thresholds)
        return Belongings(thresholds, self.calibration, Preparation(**preparation_of(self.backbone))).to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` gave.

        Raises:
            CheckpointError: it is damaged.
            ThresholdError: it is of a model with other exits.
        """
        found = Belongings.of(state)
        self.thresholds = [float(t) for t in found.thresholds]
        self.calibration = found.calibration
        prepare_(self.backbone, found.preparation.known())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if f"{prefix}{STATE}" in missing:
            missing.remove(f"{prefix}{STATE}")
            warnings.warn("this state_dict, of dynnet 0.1, has no thresholds: they stay as they are", stacklevel=2)

    def __getattr__(self, name: str) -> Any:
        if name in _RENAMED:
            raise AttributeError(f"model.{name} of version 0.1 is model.{_RENAMED[name]} now")
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> DynamicModel:
        self._dtype = None  # `.half()` and the like come through here
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        told = [
            f"exit {i} at {boundary.name} ({boundary.macs_share:.0%} of the MACs), "
            + ("switched off" if threshold == float("inf") else f"leaves at {self.measure.name} >= {threshold:.4g}")
            for i, (boundary, threshold) in enumerate(zip(self.boundaries, self.thresholds, strict=True))
        ]
        told += [] if self.gates is None else [f"gates on {self.gates.plan.macs_share:.0%} of the MACs"]
        return "\n".join(told)

    def run_every_exit(self, x: Tensor, equilibrium: bool = False, gated: bool = False) -> ExitOutputs:
        """`forward_exits` without its checks; also without gates, for dry runs."""
        decisions = self._decisions(sparse=False) if gated else None
        every = EveryExit(self.tag, x.shape, decisions, list(self.heads), equilibrium)
        with self._right_gradients(every, x), flow.run(every):  # nobody leaves, so that noted sizes stay right
            every.logits.append(only_logits(self.backbone(x), self.backbone))
            every.check_reached(self.exits)
        shares = tuple(boundary.macs_share for boundary in self.boundaries)
        return ExitOutputs(tuple(every.logits), decisions, shares)

    def _decisions(self, sparse: bool) -> Decisions | None:
        return None if self.gates is None else decisions_of(self.gates, sparse)

    def _answer(self, x: Tensor) -> tuple[Answering, Decisions | None]:
        self.check(x)
        decisions = self._decisions(sparse=self.execution == "sparse")
        answers = Answering(self.tag, x.shape, decisions, list(self.heads), self.measure, self.thresholds, self.running)
        noted = NotedSizes(answers.rows, self._of_size(tuple(x.shape[1:])).noted) if self._notes else None
        with self._right_gradients(answers, x), flow.run(answers, noted):
            logits = self.backbone(x)
            answers.check_reached(self.exits)
            answers.finish(logits)
        return answers, decisions

    def _right_gradients(self, of: Flow, x: Tensor) -> AbstractContextManager[None]:
        return right_gradients(of.learns and x.device.type == "cpu" and self._at_risk)

    def check(self, x: Tensor) -> None:
        """Refuse images that the model cannot take.

        Raises:
            InputError: of another type, shape, channels or size; or the model was unwrapped.
        """
        if self._unwrapped:
            raise InputError("this model was unwrapped; call dynnet.wrap on the backbone again")
        channels = self.input_size[0]
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"got {got}; expected float images of shape (B, {channels}, H, W), normalised")
        if len(x) == 0:
            raise InputError("got an empty batch; give at least one image")
        if x.dtype != self._dtype:  # looking it up costs as much as an operator
            self._dtype = next((p.dtype for p in self.backbone.parameters()), x.dtype)
            if x.dtype != self._dtype and not torch.is_autocast_enabled(x.device.type):
                wanted = self._dtype
                raise InputError(f"got images of {x.dtype} for a model of {wanted}; convert with x.to({wanted})")
        self.ledger(tuple(x.shape[1:]))  # of a new size a dry run, which tells in words where it does not fit


def every_layer(model: nn.Module) -> Callable[[Tensor], object]:
    """A forward in which every layer sees every sample: in a wrapped model nobody leaves and nothing is skipped."""
    return model.forward_exits if isinstance(model, DynamicModel) else model
