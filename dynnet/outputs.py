"""What a dynamic model answers. B batch, K classes, E exits; exit number E is the backbone's own head."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from dynnet.backbone.names import title
from dynnet.errors import UnsupportedError
from dynnet.gates.decisions import Decisions


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
        macs_shares: of the backbone's MACs that are spent at each of the E exits.
    """

    logits: tuple[Tensor, ...]
    decisions: Decisions | None = None
    macs_shares: tuple[float, ...] = ()


def only_logits(answer: Any, backbone: nn.Module) -> Tensor:
    """What a backbone has answered, which must be logits and nothing else.

    Raises:
        UnsupportedError: it is a tuple, say, as that of a model with auxiliary heads in train mode.
    """
    if isinstance(answer, Tensor):
        return answer
    raise UnsupportedError(
        f"{title(backbone)} answers with {type(answer).__name__} in train mode, where a wrapped model needs one tensor "
        f"of (B, K) logits; create it without auxiliary heads (torchvision's with aux_logits=False), or switch off "
        f"whatever else adds to its answer: exits take their place"
    )
