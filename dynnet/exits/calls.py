"""What one call of a dynamic model does: every exit answers, or each sample leaves where it is confident.

B batch, K classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynnet.exits.confidence import Measure, leaves
from dynnet.exits.flow import Finished, Flow, Tag
from dynnet.gates.networks import Decisions


class EveryExit(Flow):
    """All heads answer, all samples go on."""

    decisions: Decisions | None

    def __init__(
        self, tag: Tag, size: int, decisions: Decisions | None, heads: Sequence[nn.Module], equilibrium: bool
    ) -> None:
        super().__init__(tag, size, decisions)
        self.heads, self.equilibrium = heads, equilibrium
        self.logits: list[Tensor] = []

    def reach(self, index: int, output: Any, batched: Sequence[tuple[int, int]]) -> Any:
        # A backbone may go on in place (an activation, say), which must not touch what a head keeps for its backward.
        grad = torch.is_grad_enabled()
        onward = None
        if grad and self.equilibrium:
            behind = len(self.heads) - index  # classifiers after this one
            onward = _scale_gradients(output, behind / (behind + 1))
            output = _scale_gradients(output, 1 / (behind + 1))
        elif grad:
            output = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        self.logits.append(self.heads[index](output))
        return onward


class Answering(Flow):
    """Each sample leaves at the first exit that is confident of it."""

    decisions: Decisions | None

    def __init__(
        self,
        tag: Tag,
        size: int,
        decisions: Decisions | None,
        heads: Sequence[nn.Module],
        measure: Measure,
        thresholds: Sequence[float],
        active: Sequence[bool],
    ) -> None:
        super().__init__(tag, size, decisions)
        self.heads, self.measure, self.thresholds, self.active = heads, measure, thresholds, active
        self.memory: Tensor | None = None
        # One entry for each group that left: exit, original rows (None: all), logits, confidence (None: not asked yet).
        self.left: list[tuple[int, Tensor | None, Tensor, Tensor | None]] = []

    def reach(self, index: int, output: Any, batched: Sequence[tuple[int, int]]) -> Any:
        if not self.active[index]:
            return None
        logits = self.heads[index](output)
        confidence, memory = self.measure(logits, self.memory)
        threshold = self.thresholds[index]
        # The one synchronisation of an exit.
        if len(confidence) == 1:
            # Python compares, also in float64, in less time than the three operators that a batch takes.
            leaving, count = confidence, int(confidence.item() >= threshold)
        else:
            leaving = leaves(confidence, threshold)
            count = int(leaving.sum())
        if count == 0:
            self.memory = memory
            return None
        if count == len(confidence):
            self.left.append((index, self.rows, logits, confidence))
            raise Finished
        gone, kept = leaving.nonzero().squeeze(1), (~leaving).nonzero().squeeze(1)
        rows = gone if self.rows is None else self.rows[gone]
        self.left.append((index, rows, logits[gone], confidence[gone]))
        self.memory = None if memory is None else memory[kept]
        return self.thin_out(output, batched, kept)

    def finish(self, logits: Tensor) -> None:
        self.left.append((len(self.active), self.rows, logits, None))

    def logits(self) -> Tensor:
        return self._in_order([logits for _, _, logits, _ in self.left])

    def confidence(self) -> Tensor:
        return self._in_order(
            [
                self.measure(logits, self.memory)[0] if confidence is None else confidence
                for _, _, logits, confidence in self.left
            ]
        )

    def exits(self) -> Tensor:
        return self._in_order(
            [torch.full((len(logits),), exit, device=logits.device) for exit, _, logits, _ in self.left]
        )

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Parts of the batch, in the order of leaving, put back into the order of the batch."""
        if len(parts) == 1:
            return parts[0]
        rows = torch.cat([rows for _, rows, _, _ in self.left if rows is not None])
        joined = torch.cat(parts)
        return torch.empty_like(joined).index_copy(0, rows, joined)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _scale_gradients(output: Any, factor: float) -> Any:
    """The same numbers; what comes back through them is scaled."""
    return tree_map(
        lambda leaf: (
            _ScaleGradient.apply(leaf, factor) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        output,
    )
