"""Some of the channels of a layer. C channels, k of them chosen, u channels in a block."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dynnet.backbone.gather import pick


@dataclass(frozen=True)
class Subset:
    """Channels, as whole blocks of neighbours: blocks are copied at once, single channels one by one.

    Attributes:
        blocks: (k / u,) int64, ascending.
        size: u.
        width: C, of all channels.
    """

    blocks: Tensor
    size: int
    width: int

    def __len__(self) -> int:
        return len(self.blocks) * self.size

    def take(self, x: Tensor, dim: int) -> Tensor:
        """The chosen entries of a tensor along one dimension of size C: a view of it where they are neighbours."""
        if self.start is not None:
            return x.narrow(dim, self.start, len(self))
        return pick(x, dim, self.blocks.to(x.device), self.size)

    @functools.cached_property
    def start(self) -> int | None:
        """The first of the channels, where all that are chosen are neighbours."""
        blocks = self.blocks.tolist()
        neighbours = bool(blocks) and blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        return blocks[0] * self.size if neighbours else None

    def channels(self) -> Tensor:
        """(k,) int64."""
        return (self.blocks[:, None] * self.size + torch.arange(self.size, device=self.blocks.device)).flatten()


def subset(channels: Tensor, width: int) -> Subset:
    """Any ascending channels (k,) of `width`, k > 0, in the largest blocks that they fill."""
    size = 1
    while width % (2 * size) == 0 and len(channels) % (2 * size) == 0:
        runs = channels.view(-1, 2 * size)
        steps = torch.arange(2 * size, device=channels.device)
        if not bool((runs == runs[:, :1] // (2 * size) * (2 * size) + steps).all()):
            break
        size *= 2
    return Subset(channels.view(-1, size)[:, 0] // size, size, width)
