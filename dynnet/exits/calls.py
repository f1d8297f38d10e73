"""What one call of a dynamic model does: every exit answers, or each sample leaves where it is confident.

B batch, K classes
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynnet.backbone.gradients import aside, checkpointed
from dynnet.errors import InputError
from dynnet.exits.confidence import Measure
from dynnet.exits.flow import Finished, Flow, Gating, Tag, thinned
from dynnet.exits.rows import leaves


class Heads:
    """The heads of one call. Some join their answer to that of an earlier exit, their attribute `joins`, which is kept
    for them as long as its rows are here.

    Args:
        heads: one for each exit.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        self._heads = heads
        self._joins = [getattr(head, "joins", None) for head in heads]
        self._before: dict[int, Tensor] = {}

    def wanted(self, index: int) -> bool:
        """Does a later head join the answer of this one, whether anybody leaves here or not?"""
        return index in self._joins

    def __call__(self, index: int, output: Any) -> Tensor:
        """(b, K) of one exit."""
        before = self._joins[index]
        given = () if before is None else (self._before[before],)
        logits: Tensor = self._heads[index](output, *given)
        if self.wanted(index):
            self._before[index] = logits
        return logits

    def keep(self, kept: Tensor) -> None:
        """Rows have left; (b',) are those that stay."""
        self._before = {index: logits[kept] for index, logits in self._before.items()}


class EveryExit(Flow):
    """All heads answer, all samples go on."""

    def __init__(
        self, tag: Tag, images: Sequence[int], decisions: Gating | None, heads: Sequence[nn.Module], equilibrium: bool
    ) -> None:
        super().__init__(tag, images, decisions)
        self.heads, self.count, self.equilibrium = Heads(heads), len(heads), equilibrium
        self.logits: list[Tensor] = []

    def reach(self, index: int, output: Any, batched: Sequence[tuple[int, int]]) -> Any:
        if not self.learns:
            self.logits.append(self.heads(index, output))
            return None
        onward = None
        with aside():
            # A backbone may go on in place (an activation, say): that must not touch what a head keeps for backward.
            if self.equilibrium:
                behind = self.count - index  # classifiers after this one
                onward = _scale_gradients(output, behind / (behind + 1))
                output = _scale_gradients(output, 1 / (behind + 1))
            else:
                output = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
            self.logits.append(self.heads(index, output))
        return onward


class Answering(Flow):
    """Each sample leaves at the first exit that is confident of it."""

    def __init__(
        self,
        tag: Tag,
        images: Sequence[int],
        decisions: Gating | None,
        heads: Sequence[nn.Module],
        measure: Measure,
        thresholds: Sequence[float],
        active: Sequence[bool],
    ) -> None:
        super().__init__(tag, images, decisions)
        self.heads, self.measure, self.thresholds, self.active = Heads(heads), measure, thresholds, active
        self.memory: Tensor | None = None
        # Of each group that left, in that order; confidence is None where nobody has asked yet.
        self.answers: list[tuple[Tensor, Tensor | None]] = []

    def reach(self, index: int, output: Any, batched: Sequence[tuple[int, int]]) -> Any:
        if not self.active[index] and not self.heads.wanted(index):
            return None
        with aside() if self.learns else nullcontext():
            logits = self.heads(index, output)
            if not self.active[index]:
                return None
            confidence, memory = self.measure(logits, self.memory)
        # The one synchronisation of an exit. For a single sample Python compares, in less time than operators take.
        single = len(confidence) == 1
        leaving = leaves(confidence.item() if single else confidence, self.thresholds[index])
        count = int(leaving if single else leaving.sum())
        if count == 0:
            self.memory = memory
            return None
        if self.learns and checkpointed():
            raise InputError(
                "gradient checkpointing would run blocks again with rows that have left; answer under torch.no_grad(), "
                "as predict() does, or switch it off with set_grad_checkpointing(False)"
            )
        if count == len(confidence):
            self._finish(index, logits, confidence)
            raise Finished
        gone, kept = self.rows.leave(index, leaving)
        self.answers.append((logits[gone], confidence[gone]))
        self.memory = None if memory is None else memory[kept]
        self.heads.keep(kept)
        return thinned(output, batched, kept)

    def finish(self, logits: Tensor) -> None:
        """The backbone's own head has answered."""
        self._finish(len(self.active), logits, None)

    def _finish(self, exit: int, logits: Tensor, confidence: Tensor | None) -> None:
        self.answers.append((logits, confidence))
        self.rows.finish(exit)

    def logits(self) -> Tensor:
        """(B, K)."""
        return cast(Tensor, self.rows.in_order([logits for logits, _ in self.answers]))

    def confidence(self) -> Tensor:
        """(B,)."""
        asked = [
            self.measure(logits, self.memory)[0] if confidence is None else confidence
            for logits, confidence in self.answers
        ]
        return cast(Tensor, self.rows.in_order(asked))

    def exits(self) -> Tensor:
        """(B,) int64."""
        taken = [
            torch.full((len(logits),), exit, device=logits.device)
            for (exit, _), (logits, _) in zip(self.rows.exits(), self.answers, strict=True)
        ]
        return cast(Tensor, self.rows.in_order(taken))


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
