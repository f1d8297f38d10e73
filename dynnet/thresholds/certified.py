"""Risk that is certified: an exact binomial test along a fixed sequence of thresholds, from "never exit" to cheaper.

A sample is harmed, or it is not; of n samples, k are. Were the risk above alpha, so few would be harmed with a
probability of at most P[Bin(n, alpha) <= k]. Thresholds are tried in an order that was fixed before the samples were
looked at, as long as that probability is at most delta: then the last one that passed has a risk of at most alpha, with
probability 1 - delta over the samples (Bauer, "Multiple testing in clinical trials", 1991; Angelopoulos et al., "Learn
then Test", https://arxiv.org/abs/2110.01052; for early exits Jazbec et al., "Fast yet Safe",
https://arxiv.org/abs/2405.20915).

    n samples, k of them harmed
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dynnet.backbone.digest import digest_of
from dynnet.backbone.host import preparation_of
from dynnet.exits.threshold import to_json
from dynnet.model import STATE, DynamicModel
from dynnet.schema import typed
from dynnet.thresholds.answers import Harm


@dataclass(frozen=True)
class Certificate:
    """What was shown of a model, and of which model.

    Attributes:
        of: what counts as harm, see `Answers.harmed`.
        risk: alpha: the share of new samples that is harmed is at most this,
        delta: but for this probability, over the samples that were drawn.
        failures, samples: k of n, on samples that thresholds were not chosen on.
        weights, preparation: fingerprints of the model's numbers, and of how its images are prepared.
        precision: type of its weights.
        engine: in which it ran.
    """

    of: Harm
    risk: float
    delta: float
    failures: int
    samples: int
    weights: str
    preparation: str
    precision: str
    engine: str

    def __str__(self) -> str:
        harm = {"disagreement": "differ from the full model's", "lost": "are wrong where the full model is right"}
        return (
            f"certified: at most {self.risk:.2%} of the answers {harm[self.of]}, with {1 - self.delta:.0%} confidence "
            f"({self.failures} of {self.samples} did)"
        )

    def void(self, model: DynamicModel) -> str | None:
        """Why it does not hold for a model as it is now, in words; None where it does."""
        changed = [key for key, value in subject_of(model)._asdict().items() if getattr(self, key) != value]
        return f"it was given for other {' and '.join(changed)}" if changed else None


class Subject(NamedTuple):
    """What a certificate holds for; see there."""

    weights: str
    preparation: str
    precision: str
    engine: str


def subject_of(model: DynamicModel) -> Subject:
    """A model as it is now."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    prepared = json.dumps([model.config.input_size, preparation_of(model.backbone)])
    return Subject(
        digest_of({name: tensor for name, tensor in model.state_dict().items() if name != STATE}),
        digest_of({}, prepared),
        "none" if weight is None else str(weight.dtype).removeprefix("torch."),
        "pytorch",
    )


def void_certificate(model: DynamicModel) -> str | None:
    """Why the certificate of a model's thresholds does not hold, in words; None where it does, or there is none.

    Raises:
        SchemaError: what the model says of its calibration is nothing that `dynnet.calibrate` would say.
    """
    said = model.calibration or {}
    if said.get("certificate") is None:
        return None
    if list(said.get("thresholds") or ()) != [to_json(t) for t in model.thresholds]:
        return "it was given for other thresholds"
    certificate: Certificate = typed(Certificate, said["certificate"], "calibration.certificate")
    return certificate.void(model)


def p_value(failures: int, samples: int, risk: float) -> float:
    """P[Bin(n, risk) <= k]: how likely so few failures were, were the risk as large as that."""
    if failures >= samples:
        return 1.0
    # In logarithms: the first terms are far below the smallest float where n is large.
    log = [
        math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1)
        + k * math.log(risk) + (samples - k) * math.log1p(-risk)
        for k in range(failures + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(math.exp(term) for term in log))


def safe_steps(failures: Sequence[int], samples: int, risk: float, delta: float) -> int:
    """How many steps of a sequence pass, one after the other; none after the first that does not.

    Args:
        failures: of each step, in an order that was fixed before.
        samples: n, the same ones for all steps.
        risk, delta: as in `Certificate`.
    """
    for step, count in enumerate(failures):
        if p_value(count, samples, risk) > delta:
            return step
    return len(failures)


def samples_needed(risk: float, delta: float, rate: float = 0.0) -> int:
    """So many samples certify a risk if this share of them fails, below the risk; hardly fewer do."""

    def passes(samples: int) -> bool:
        return p_value(math.ceil(rate * samples), samples, risk) <= delta

    enough = 1
    while not passes(enough):
        enough *= 2
    fails = enough // 2
    while enough - fails > 1:
        middle = (fails + enough) // 2
        fails, enough = (fails, middle) if passes(middle) else (middle, enough)
    return enough
