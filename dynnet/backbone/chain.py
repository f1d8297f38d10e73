"""Models in a row: the backbone of a cascade, and what brings images to each of its members.

B batch, K classes, M members
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynnet.backbone.host import preparation_of, prepare_
from dynnet.backbone.names import title
from dynnet.backbone.twin import copy_of

Combine = Literal["last", "mean"]


class Entry(nn.Module):
    """Images of a chain as one of its members takes them.

    Args:
        size: (H, W) to which they are brought; None where they have it already.
        scale, shift: of each channel, from the chain's preparation to the member's; None where they are the same.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, size: tuple[int, int] | None, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, h, w)."""
        if self.size is not None:
            whole = all(side % own == 0 for side, own in zip(x.shape[2:], self.size, strict=True))
            if whole:  # neither aliases nor weighs
                x = F.avg_pool2d(x, (x.shape[2] // self.size[0], x.shape[3] // self.size[1]))
            else:
                x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)
        return x if self.scale is None or self.shift is None else x * self.scale + self.shift


class Join(nn.Module):
    """What two members in a row answer together."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number  # of those that have answered before

    def forward(self, before: Tensor, logits: Tensor) -> Tensor:
        """(B, K) what the members before say together, as logarithms of probabilities or, of one, logits; and logits of
        this one. Returns logarithms of the mean of all probabilities."""
        one, other = before.float().softmax(1), logits.float().softmax(1)
        mean = (self.number * one + other) / (self.number + 1)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log().to(logits.dtype)


class Chain(nn.Module):
    """Models in a row, all of which run: the backbone of a cascade. Made by `cascade`.

    Attributes:
        members: plain models from images to (B, K) logits.
        entries: what brings the chain's images to each.
        joins: what joins the answer of each but the first to those before; none where the last answer counts.
        sizes: (C, H, W) of each member's images.
        wraps: how each was wrapped, a `WrapConfig`; None where it was plain.

    Args:
        preparation: of the chain's images, as in timm's `pretrained_cfg`.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        entries: Sequence[nn.Module],
        combine: Combine,
        preparation: Mapping[str, Any],
        sizes: Sequence[tuple[int, int, int]],
        wraps: Sequence[Any],
    ) -> None:
        super().__init__()
        self.members, self.entries = nn.ModuleList(members), nn.ModuleList(entries)
        self.joins = nn.ModuleList(Join(number + 1) for number in range((len(members) - 1) * (combine == "mean")))
        self.combine, self.sizes, self.wraps = combine, tuple(sizes), tuple(wraps)
        names = " then ".join(title(member) for member in members)
        prepare_(self, {"architecture": names, **preparation})
        self.training = any(member.training for member in members)
        for own in (self.members, self.entries, self.joins):
            own.training = self.training

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K)."""
        answer: Tensor | None = None
        for number, (entry, member) in enumerate(zip(self.entries, self.members, strict=True)):
            logits = member(entry(x))
            answer = logits if answer is None or not len(self.joins) else self.joins[number - 1](answer, logits)
        assert answer is not None
        return answer

    def end(self, number: int) -> str:
        """The module whose output is the answer when so many members are done."""
        return f"joins.{number - 1}" if number and len(self.joins) else f"members.{number}"

    def alone(self) -> Chain:
        """The last member by itself, with what brings images to it; its modules stay this chain's as well."""
        return Chain(
            [self.members[-1]], [self.entries[-1]], "last", preparation_of(self), self.sizes[-1:], self.wraps[-1:]
        )


def bare_of(model: Any) -> nn.Module:
    """What a wrapped model is compared with: a copy of its backbone without hooks; of a cascade, the last member."""
    backbone: nn.Module = copy_of(model).unwrap()
    return backbone.alone() if isinstance(backbone, Chain) else backbone


def exits_before(backbone: nn.Module, exits: Sequence[str]) -> int:
    """How many of the exits stand before what the model is compared with begins: those up to a chain's last member."""
    if not isinstance(backbone, Chain) or len(backbone.members) == 1:
        return 0
    return list(exits).index(backbone.end(len(backbone.members) - 2)) + 1
