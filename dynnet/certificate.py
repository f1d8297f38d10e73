"""What was certified of a model's thresholds, and whether it still holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dynnet.backbone.digest import digest_of
from dynnet.backbone.host import preparation_of
from dynnet.exits.threshold import to_json
from dynnet.model import STATE, DynamicModel
from dynnet.schema import typed

Harm = Literal["disagreement", "lost"]  # an answer differs from the full model's, or is wrong where that is right


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
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != STATE}
    if model.gates is not None and model.gates.frozen is not None:
        tensors |= {f"frozen.{number}": mask for number, mask in enumerate(model.gates.frozen)}
    prepared = json.dumps([model.config.input_size, preparation_of(model.backbone)])
    return Subject(
        digest_of(tensors),
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
