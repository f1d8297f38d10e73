"""Which channel every entry of a tensor belongs to, for all tensors of a running forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FREE = -1  # the label of what is no channel of any layer

# By what names modules of attention state how many heads they have, and how wide these are together.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
TOGETHER = ("attn_dim", "all_head_dim", "attn_channels", "inner_dim", "key_attn_dim", "val_attn_dim", "out_dim")


class Labels:
    """Labels are kept as int64 tensors with as many dimensions as the tensor that they describe, of size 1 along those
    in which they do not change.

    Attributes:
        ties: labels that belong together, and the module whose forward ties them.
        pins: labels that cannot be taken away, and why.
        numbers: plain numbers that operators computed with, the labels they met, and the module, in running order.
        heads: by module that states a number of heads, the labels of what it has split into heads.
        running: the modules whose forward is running, with their names, the innermost last.
    """

    def __init__(self) -> None:
        self.ties: list[tuple[Tensor, Tensor, str]] = []
        self.pins: list[tuple[Tensor, str]] = []
        self.numbers: list[tuple[tuple[float, ...], Tensor, str]] = []
        self.heads: dict[str, list[Tensor]] = {}
        self.running: list[tuple[str, nn.Module]] = []
        self._of: dict[int, Tensor] = {}
        self._held: list[Tensor] = []  # an identity may not be used twice

    def where(self) -> str:
        """The module whose forward is running."""
        return self.running[-1][0] if self.running and self.running[-1][0] else "the model itself"

    def in_heads(self) -> bool:
        """Does the module whose forward is running state a number of heads?"""
        return any(isinstance(vars(self.running[-1][1]).get(key), int) for key in HEADS) if self.running else False

    def of(self, x: Tensor) -> Tensor | None:
        return self._of.get(id(x))

    def set(self, x: Tensor, label: Tensor, dim: int | None = None) -> None:
        """Label a tensor; a `label` of one dimension goes along `dim`."""
        if dim is not None:
            label = label.view([-1 if d == dim else 1 for d in range(x.ndim)])
        if id(x) not in self._of:
            self._held.append(x)
        self._of[id(x)] = settled(label)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """These live and die together, entry by entry."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.ties.append((a[both], b[both], self.where()))

    def pin(self, label: Tensor | None, reason: str) -> None:
        """These cannot be taken away."""
        if label is not None:
            self.pins.append((label[label >= 0].flatten(), reason))


def settled(label: Tensor) -> Tensor:
    """Without the dimensions along which it does not change."""
    for d in range(label.ndim):
        if label.shape[d] > 1 and label.stride(d) == 0:
            label = label.narrow(d, 0, 1)
    for d in range(label.ndim):
        if label.shape[d] > 1 and bool((label == label.narrow(d, 0, 1)).all()):
            label = label.narrow(d, 0, 1)
    return label.contiguous()


def varies(label: Tensor) -> int:
    """Along how many dimensions a label changes."""
    return sum(size > 1 for size in label.shape)
