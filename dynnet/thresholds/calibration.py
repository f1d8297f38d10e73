"""`calibrate`: thresholds from held-out data, for a goal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from dynnet.backbone.modes import evaluating
from dynnet.backbone.names import title
from dynnet.certificate import Certificate, Harm, subject_of
from dynnet.errors import CalibrationError
from dynnet.exits.threshold import to_json
from dynnet.gates.routers import Routers
from dynnet.model import DynamicModel
from dynnet.thresholds.answers import collect
from dynnet.thresholds.clocked import Clocked
from dynnet.thresholds.goals import AccuracyDrop, Budget, Choice, Goal, Latency, Risk
from dynnet.thresholds.leaning import leaning
from dynnet.thresholds.table import Table


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did. Saved with the model.

    Attributes:
        goal: "budget", "latency", "accuracy_drop" or "risk".
        value: what was asked for.
        thresholds: what was found, infinite ones as "inf" and "-inf".
        samples: how many it was fitted on.
        confidence: the measure that the thresholds belong to.
        accuracy, macs: of the dynamic model on those samples; MACs are means per sample. Accuracies are None where
            there were no labels.
        drop, drop_error: how far accuracy will fall below the final classifier's on new samples, and the standard error
            of that estimate, from samples that the thresholds were not fitted on; None where samples are too few.
        full_accuracy, dense_macs: of the final classifier, and of the bare backbone.
        rates: share of the samples that leaves at each exit and at the end.
        certificate: what was shown of a risk, with its condition; None for a budget, and where nothing was.
        needed: samples that may certify the risk where these did not; 0 where no number will.
        clocked: the time in the engine, where that was asked for.
        lean: how far routers prefer narrow widths, where there are any and a budget or a time was asked for.
    """

    goal: str
    value: float
    thresholds: tuple[float | str, ...]
    samples: int
    confidence: str
    accuracy: float | None
    macs: float
    drop: float | None
    drop_error: float | None
    full_accuracy: float | None
    dense_macs: int
    rates: tuple[float, ...]
    certificate: Certificate | None = None
    needed: int | None = None
    clocked: Clocked | None = None
    lean: float | None = None

    def __str__(self) -> str:
        rates = " / ".join(f"{rate:.0%}" for rate in self.rates)
        right = ""
        if self.accuracy is not None and self.full_accuracy is not None:
            right = f"accuracy {self.accuracy:.2%} (never exiting {self.full_accuracy:.2%}{self._new()}) at "
        return (
            f"calibrated for {self.goal}={self.value:g} on {self.samples} samples: {right}"
            f"{self.macs / self.dense_macs:.1%} of the MACs "
            f"({self.macs / 1e6:.2f} of {self.dense_macs / 1e6:.2f} MMAC, {2 * self.macs / 1e6:.2f} MFLOP)"
            f"{f', {self.clocked}' if self.clocked else ''}; exits taken {rates}{self._shown()}"
        )

    def _new(self) -> str:
        if self.drop is None:
            return ""
        side = "lower" if self.drop >= 0 else "higher"
        return f", {abs(self.drop):.2%} ± {self.drop_error:.2%} {side} expected on new samples"

    def _shown(self) -> str:
        if self.clocked is not None:
            off = sum(threshold == "inf" for threshold in self.thresholds)
            return f"; {off} switched off, whose heads take more time than they save" if off else ""
        if self.certificate is not None:
            return f"; {self.certificate}"
        if self.needed is None:
            return ""
        remedy = f"some {self.needed} samples may do" if self.needed else "the exits harm more than that; train them on"
        return f"; nothing could be certified, so nobody exits: {remedy}"


def calibrate(
    model: DynamicModel,
    loader: Iterable[Tensor | Sequence[Tensor]],
    *,
    budget: float | None = None,
    latency: float | None = None,
    accuracy_drop: float | None = None,
    risk: float | None = None,
    delta: float = 0.05,
    of: Harm = "disagreement",
    engine: str = "onnxruntime",
    batch_size: int = 1,
) -> Calibration:
    """Fit `model.thresholds` on held-out data. Never use the test split.

    >>> import timm, torch, dynnet
    >>> model = dynnet.wrap(timm.create_model("cifar_resnet20"), exits=["layer1", "layer2"])
    >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
    >>> fitted = calibrate(model, loader, budget=0.8)
    >>> fitted.goal, fitted.samples, fitted.macs <= 0.8 * fitted.dense_macs
    ('budget', 32, True)

    Args:
        model: gets the thresholds, and a record of what they were fitted on.
        loader: batches of (images, labels, ...) that were not trained on; of images alone where `of` needs no labels.
        budget: mean MACs per sample, as a share of the bare backbone's. The best accuracy within it is taken; where the
            samples cannot tell the difference, within two standard errors, the thresholds that spend more. Of a model
            of several widths, how far its routers prefer narrow ones is chosen with them; the loader is gone through
            once for each of nine preferences.
        latency: the same for the mean time of a batch in an engine, as a share of the bare backbone's there. Both are
            exported for the time and measured, on this machine, in as many threads as PyTorch has, with one exit on
            after the other and at last with those that are chosen, which takes from half a minute on. An exit whose
            head takes more time than it saves is switched off. Of a model of several widths, budgets of MACs are tried
            instead, and timed on some of the images, until the time is met.
        accuracy_drop: how far accuracy may fall below never exiting on new samples, 0.005 for half a point: as `risk`
            with of="lost", for accuracy falls by no more than right answers are lost.
        risk: the share of new samples that may be harmed, with a confidence of 1 - delta. Thresholds are tried from
            "never exit" to ever fewer MACs, in an order that is learnt on one half of the samples, and tested on the
            other half with an exact binomial test; the last that passes is taken. Where none does, nobody exits, and
            the record says how many samples may do.
        delta: the probability, over the samples given, that the risk is larger after all.
        of: what counts as harm: "disagreement": the early answer differs from the full model's, which needs no labels;
            "lost": it is wrong where the full model's is right.
        engine, batch_size: for `latency`; the engine as for `dynnet.export`.

    Raises:
        CalibrationError: not exactly one goal, one that cannot be reached, or a model without exits.
        DataError, NonFiniteError: the loader or the model's answers are no basis; thresholds are left as they were.
        ExportError: for `latency`, a model that cannot be exported, or an engine that is not installed.
    """
    goal = make_goal(
        budget=budget, latency=latency, accuracy_drop=accuracy_drop, risk=risk, delta=delta, of=of, engine=engine,
        batch_size=batch_size,
    )  # fmt: skip
    if not isinstance(model, DynamicModel):
        raise CalibrationError(
            f"{title(model)} is a plain model: it has no exits, and no thresholds to fit; call dynnet.wrap first"
        )
    if not model.exits:
        raise CalibrationError("the model has no exits, there are no thresholds to fit")
    goal.check(model)
    if isinstance(goal, Budget | Latency) and isinstance(model.gates, Routers):
        once = isinstance(loader, Iterator)
        lean, table, choice = leaning(goal, model, model.gates, list(loader) if once else loader)
    else:
        lean, table = None, _asked(model, loader)
        with evaluating(model):
            goal = goal.prepared(model)
            choice = goal.choose(table)
    model.thresholds = choice.point.thresholds
    calibration = replace(_record(goal, table, choice, model), lean=lean)
    model.calibration = asdict(calibration)
    return calibration


def _asked(model: DynamicModel, loader: Iterable[Tensor | Sequence[Tensor]]) -> Table:
    answers = collect(model, loader)
    return Table(answers, model.ledger(answers.input_size), model.measure)


def make_goal(
    *,
    budget: float | None = None,
    latency: float | None = None,
    accuracy_drop: float | None = None,
    risk: float | None = None,
    delta: float = 0.05,
    of: Harm = "disagreement",
    engine: str = "onnxruntime",
    batch_size: int = 1,
) -> Goal:
    """The one goal that is given, with the arguments of `calibrate`.

    Raises:
        CalibrationError: not exactly one.
    """
    goals: dict[str, Goal] = {}
    if budget is not None:
        goals["budget"] = Budget(budget)
    if latency is not None:
        goals["latency"] = Latency(latency, engine, batch_size)
    if accuracy_drop is not None:
        goals["accuracy_drop"] = AccuracyDrop(accuracy_drop, delta)
    if risk is not None:
        goals["risk"] = Risk(risk, delta, of)
    if len(goals) != 1:
        told = " and ".join(f"{name}={goal.value}" for name, goal in goals.items()) or "no goal"
        raise CalibrationError(f"got {told}; give exactly one of budget=, latency=, accuracy_drop= and risk=")
    return next(iter(goals.values()))


def _record(goal: Goal, table: Table, choice: Choice, model: DynamicModel) -> Calibration:
    point, drop, verdict, clocked = choice
    answers = table.answers
    taken = answers.route(point.thresholds)
    certificate = None
    if isinstance(goal, Risk) and verdict is not None and verdict.needed is None:
        shown = (goal.of, goal.value, goal.delta, verdict.failures, verdict.samples)
        certificate = Certificate(*shown, *subject_of(model))
    return Calibration(
        goal=goal.name,
        value=goal.value,
        thresholds=tuple(to_json(t) for t in point.thresholds),
        samples=table.samples,
        confidence=table.measure.name,
        accuracy=point.accuracy if answers.labelled else None,
        macs=point.macs,
        drop=drop.mean if drop else None,
        drop_error=drop.error if drop else None,
        full_accuracy=float(answers.correct[:, -1].mean()) if answers.labelled else None,
        dense_macs=table.ledger.dense,
        rates=tuple(float((taken == e).mean()) for e in range(table.exits + 1)),
        certificate=certificate,
        needed=None if verdict is None else verdict.needed,
        clocked=clocked,
    )
