"""`verify`: does a wrapped model keep its promises, with real numbers? B images, E exits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynnet.backbone.counting import flop_counter
from dynnet.backbone.modes import device_of, evaluating
from dynnet.backbone.names import title
from dynnet.backbone.twin import copy_of
from dynnet.errors import InputError, VerificationError
from dynnet.exits.confidence import Measure
from dynnet.model import DynamicModel
from dynnet.outputs import Prediction

# Of the largest logit, absolute below one: what another batch size does to rounding.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        promise: in words.
        worst: the largest deviation that was found, in `unit`.
        allowed: the largest that keeps the promise.
        unit: of both.
        where: which image, at which exit, deviates most.
    """

    promise: str
    worst: float
    allowed: float
    unit: str
    where: str

    @property
    def kept(self) -> bool:
        return self.worst <= self.allowed  # NaN is not

    def __str__(self) -> str:
        mark = "kept" if self.kept else "BROKEN"
        return f"{self.promise:<42}{mark:<8}{self.worst:<10.2g}of {self.allowed:<8.2g}{self.unit}; {self.where}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found: one `Check` a promise. Prints as a table."""

    checks: tuple[Check, ...]

    def __str__(self) -> str:
        return "\n".join(str(check) for check in self.checks)


@torch.no_grad()
def verify(model: DynamicModel, images: Tensor) -> Verification:
    """Try a wrapped model's promises on real images.

    - Never exiting equals the backbone, bit for bit.
    - A sample gets the same answer alone as in a batch from which others leave, at whichever exit.
    - A sample's bill equals what PyTorch's counter sees when it runs alone.

    >>> import torch, dynnet
    >>> print(str(verify(dynnet.create_model("digits"), torch.randn(4, 1, 8, 8)))[:50])
    never exiting equals the backbone         kept

    Args:
        model: wrapped; thresholds do not matter, and are left as they are. Gates decide as they do.
        images: (B, C, H, W), at least two; with more than E of them every exit is taken.

    Raises:
        VerificationError: a promise is broken; the message names what differs.
        InputError: a plain model, fewer than two images, or such as the model cannot take.
    """
    if not isinstance(model, DynamicModel):
        raise InputError(f"{title(model)} is a plain model, and promises nothing; call dynnet.wrap first")
    if not isinstance(images, Tensor) or len(images) < 2:
        got = f"{len(images)} images" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise InputError(f"got {got}; give at least two, (B, C, H, W): who leaves must not touch who stays")
    images = images.to(device_of(model))
    twin = copy_of(model)
    twin.check(images)
    twin.measure = InTurn(len(model.exits))
    twin.thresholds = [1.0] * len(model.exits)
    twin.execution = "sparse"  # of which the bill is
    with evaluating(twin):
        found = Verification((_as_the_backbone(twin, images), _alone(twin, images), _bill(twin, images)))
    broken = [check for check in found.checks if not check.kept]
    if broken:
        raise VerificationError(f"the wrapped {title(model.backbone)} does not keep what it promises:\n{found}")
    return found


class InTurn(Measure):
    """The first sample leaves at the first exit, the second at the second, and so on, round and round; alone, a sample
    leaves where it did in company.

    Networks that have not been trained answer all images alike; who leaves where must not depend on that.
    """

    name = "in turn"
    every_vote = True

    def __init__(self, exits: int) -> None:
        self.classifiers = exits + 1
        self.first = 0  # the number of the first sample of the batch

    def __call__(self, logits: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        if memory is None:
            number = torch.arange(self.first, self.first + len(logits), device=logits.device) % self.classifiers
            memory = torch.stack([number, torch.zeros_like(number)], 1)
        number, exit = memory.T
        return (number == exit).double(), torch.stack([number, exit + 1], 1)


def _as_the_backbone(model: DynamicModel, images: Tensor) -> Check:
    if model.gates is None:
        before, model.thresholds = model.thresholds, [float("inf")] * len(model.exits)
        ours, model.thresholds = model.predict(images).logits, before
    else:
        ours = model.run_every_exit(images).logits[-1]  # without gates: they are another model
    backbone = copy_of(model).unwrap()
    theirs = backbone(images)
    worst, image = _deviation(ours, theirs)
    # Bit for bit, or what the numbers differ by.
    worst = 0.0 if torch.equal(ours, theirs) else worst or float("nan")
    return Check("never exiting equals the backbone", worst, 0.0, "of the largest logit", f"image {image}")


def _alone(model: DynamicModel, images: Tensor) -> Check:
    together = model.predict(images)
    alone = [_by_itself(model, images, number) for number in range(len(images))]
    worst, image = _deviation(torch.cat([one.logits for one in alone]), together.logits)
    elsewhere = (torch.cat([one.exit for one in alone]) != together.exit).nonzero()
    if len(elsewhere):
        worst, image = float("inf"), int(elsewhere[0])
    allowed = TOLERANCES.get(together.logits.dtype, 1e-4)
    where = f"image {image}, which leaves at {_name(model, int(together.exit[image]))}"
    return Check("a sample alone equals it in company", worst, allowed, "of the largest logit", where)


def _bill(model: DynamicModel, images: Tensor) -> Check:
    worst, where = -1.0, ""
    for number in range(min(len(images), len(model.exits) + 1)):
        counter = flop_counter()
        with counter:
            prediction = _by_itself(model, images, number)
        billed, counted = int(prediction.macs), counter.get_total_flops() // 2
        if abs(billed - counted) > worst:
            worst = float(abs(billed - counted))
            where = f"{_name(model, int(prediction.exit))}: {billed} billed, {counted} counted"
    return Check("the bill equals the counter", worst, 0.0, "MACs", where)


def _by_itself(model: DynamicModel, images: Tensor, number: int) -> Prediction:
    """What one of the images gets alone; it leaves where it does in company."""
    measure = model.measure
    assert isinstance(measure, InTurn)
    measure.first = number
    prediction = model.predict(images[number : number + 1])
    measure.first = 0
    return prediction


def _deviation(a: Tensor, b: Tensor) -> tuple[float, int]:
    """The largest difference of any row, of its largest logit and absolute below one, and the row."""
    a, b = a.double(), b.double()
    rows = (a - b).abs().amax(1) / b.abs().amax(1).clamp(min=1)
    return float(rows.max()), int(rows.argmax())


def _name(model: DynamicModel, exit: int) -> str:
    return f"exit {model.exits[exit]!r}" if exit < len(model.exits) else "the end"
