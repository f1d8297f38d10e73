"""`calibrate`: thresholds from held-out data, for a goal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from dynnet.backbone.names import title
from dynnet.errors import CalibrationError
from dynnet.exits.confidence import to_json
from dynnet.model import DynamicModel
from dynnet.thresholds.answers import collect
from dynnet.thresholds.goals import GOALS, Choice, Goal
from dynnet.thresholds.table import Table


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did. Saved with the model.

    Attributes:
        goal: "budget" or "accuracy_drop".
        value: what was asked for.
        thresholds: what was found, infinite ones as "inf" and "-inf".
        samples: how many it was fitted on.
        confidence: the measure that the thresholds belong to.
        accuracy, macs: of the dynamic model on those samples; MACs are means per sample.
        drop, drop_error: how far accuracy will fall below the final classifier's on new samples, and the standard error
            of that estimate, by cross-validation; None where samples are too few.
        full_accuracy, dense_macs: of the final classifier, and of the bare backbone.
        rates: share of the samples that leaves at each exit and at the end.
    """

    goal: str
    value: float
    thresholds: tuple[float | str, ...]
    samples: int
    confidence: str
    accuracy: float
    macs: float
    drop: float | None
    drop_error: float | None
    full_accuracy: float
    dense_macs: int
    rates: tuple[float, ...]

    def __str__(self) -> str:
        rates = " / ".join(f"{rate:.0%}" for rate in self.rates)
        new = ""
        if self.drop is not None:
            side = "lower" if self.drop >= 0 else "higher"
            new = f", {abs(self.drop):.2%} ± {self.drop_error:.2%} {side} expected on new samples"
        return (
            f"calibrated for {self.goal}={self.value:g} on {self.samples} samples: accuracy {self.accuracy:.2%} "
            f"(never exiting {self.full_accuracy:.2%}{new}) at {self.macs / self.dense_macs:.1%} of the MACs "
            f"({self.macs / 1e6:.2f} of {self.dense_macs / 1e6:.2f} MMAC, {2 * self.macs / 1e6:.2f} MFLOP); "
            f"exits taken {rates}"
        )


def calibrate(
    model: DynamicModel,
    loader: Iterable[Sequence[Tensor]],
    *,
    budget: float | None = None,
    accuracy_drop: float | None = None,
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
        loader: batches of (images, labels, ...) that were not trained on.
        budget: mean MACs per sample, as a share of the bare backbone's. The best accuracy within it is taken; where the
            samples cannot tell the difference, within two standard errors, the thresholds that spend more.
        accuracy_drop: how far accuracy may fall below never exiting on new samples, 0.005 for half a point. The fewest
            MACs are taken at which the drop, as cross-validation sees it, plus its standard error stays within: few
            samples cannot promise much.

    Raises:
        CalibrationError: not exactly one goal, one that cannot be reached, or a model without exits.
        DataError, NonFiniteError: the loader or the model's answers are no basis; thresholds are left as they were.
    """
    goal = make_goal(budget=budget, accuracy_drop=accuracy_drop)
    if not isinstance(model, DynamicModel):
        raise CalibrationError(
            f"{title(model)} is a plain model: it has no exits, and no thresholds to fit; call dynnet.wrap first"
        )
    if not model.exits:
        raise CalibrationError("the model has no exits, there are no thresholds to fit")
    goal.check(model)
    answers = collect(model, loader)
    table = Table(answers, model.ledger(answers.input_size), model.measure)
    choice = goal.choose(table)
    model.thresholds = choice.point.thresholds
    calibration = _record(goal, table, choice)
    model.calibration = asdict(calibration)
    return calibration


def make_goal(**given: float | None) -> Goal:
    """The one goal that is given, by its name.

    Raises:
        CalibrationError: not exactly one.
    """
    goals = [GOALS[name](value) for name, value in given.items() if value is not None]
    if len(goals) != 1:
        told = " and ".join(f"{name}={value}" for name, value in given.items())
        raise CalibrationError(f"got {told}; give exactly one of them")
    return goals[0]


def _record(goal: Goal, table: Table, choice: Choice) -> Calibration:
    point, drop = choice
    taken = table.answers.route(point.thresholds)
    return Calibration(
        goal=goal.name,
        value=goal.value,
        thresholds=tuple(to_json(t) for t in point.thresholds),
        samples=table.samples,
        confidence=table.measure.name,
        accuracy=point.accuracy,
        macs=point.macs,
        drop=drop.mean if drop else None,
        drop_error=drop.error if drop else None,
        full_accuracy=float(table.answers.correct[:, -1].mean()),
        dense_macs=table.ledger.dense,
        rates=tuple(float((taken == e).mean()) for e in range(table.exits + 1)),
    )
