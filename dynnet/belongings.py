"""What a wrapped model takes along besides its weights, as the bytes of one tensor: a `state_dict` holds those only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dynnet.backbone.host import Preparation
from dynnet.errors import CheckpointError, SchemaError
from dynnet.schema import parse, typed

Threshold = float | Literal["inf", "-inf"]  # as JSON has it
_Plain = None | bool | int | float | str
Told = dict[str, _Plain | tuple[_Plain, ...] | dict[str, _Plain]]  # a record of a calibration


@dataclass(frozen=True)
class Belongings:
    """What a model takes along into copies of its state.

    Attributes:
        thresholds: of its exits.
        calibration: what they were fitted on and for.
        preparation: of its images, and the names of its classes.
    """

    thresholds: tuple[Threshold, ...] = ()
    calibration: Told | None = None
    preparation: Preparation = field(default_factory=Preparation)

    def to_tensor(self) -> Tensor:
        """(bytes,) uint8, of JSON."""
        prepared = self.preparation.known()
        told = {**asdict(self), "preparation": prepared}
        # Thresholds may change while an average of weights is kept, which wants tensors of one size.
        size = len(json.dumps(prepared)) + 2048 + 128 * len(self.thresholds)
        return torch.frombuffer(bytearray(json.dumps(told).ljust(size).encode()), dtype=torch.uint8)

    @classmethod
    def of(cls, state: Tensor) -> Belongings:
        """What `to_tensor` gave.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            if state.dtype != torch.uint8 or state.ndim != 1:
                raise SchemaError(f"it is {tuple(state.shape)} numbers of {state.dtype}")
            found: Any = typed(cls, parse(bytes(state.tolist()).decode()))
        except (SchemaError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"what this state says of thresholds and images is damaged ({error}); take another copy"
            ) from error
        return found
