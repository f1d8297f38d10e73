"""Time that thresholds were fitted for, as it is recorded and told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clocked:
    """Time that thresholds were fitted for.

    Attributes:
        engine: and its version.
        threads: of the engine.
        batch_size: B.
        dense_ms: milliseconds of a batch through the bare backbone,
        ms: and through the model, in the mean.
    """

    engine: str
    threads: int
    batch_size: int
    dense_ms: float
    ms: float

    def __str__(self) -> str:
        several = f" a batch of {self.batch_size}" if self.batch_size > 1 else ""
        return (
            f"{self.ms:.3g} of {self.dense_ms:.3g} ms{several} ({self.ms / self.dense_ms:.1%}; {self.engine}, "
            f"{self.threads} thread{'s' * (self.threads > 1)})"
        )
