"""Channel groups: which channels of which layers live and die together.

Channels that a dry run finds tied (`following.py`) form a *unit* that can only be taken away as a whole, and all units
that touch the same layers form a *group*. A group that cannot be narrowed says why. The others have been rehearsed: the
model ran with most of their units gone, and every channel arrived where it belongs.

    C channels of a layer, U units of a group, n channels of a layer that belong to one unit
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynnet.channels.following import Role

_FEWEST = 4  # bundles of a group, where its units allow


@dataclass(frozen=True)
class Member:
    """One side of one layer, as part of a group.

    Attributes:
        layer: name of the module.
        role: "produces" channels (a convolution's or linear layer's outputs), "passes" them on one by one (batch norm,
            depthwise convolution), "mixes" them (layer norm, group norm, global response norm: passes them on, but
            every one depends on others), or "reads" them (a convolution's or linear layer's inputs).
        channels: (U, n) int64, the layer's channels that belong to each unit.
        width: C, of all channels on this side of the layer.
        pixels: positions at which the layer works, H * W or the tokens; 1 behind a pooling.
        grouped: one side of a grouped convolution, which makes group by group from what it reads.
    """

    layer: str
    role: Role
    channels: np.ndarray
    width: int
    pixels: int
    grouped: bool = False


class Number(NamedTuple):
    """What a module states that depends on how many units there are: a number of heads, or their width.

    Attributes:
        module: its name.
        key: of the attribute.
        per_unit: what one unit adds to it.
    """

    module: str
    key: str
    per_unit: int


@dataclass(frozen=True)
class Group:
    """Units that touch the same layers.

    Attributes:
        members: in the order in which they run.
        units: U.
        pinned: why the units cannot be narrowed; None where they can.
        coupled: the units of several blocks are tied by a residual sum, or travel past other layers.
        inputs: channels that its first layer reads.
        segment: how many of the `seen` modules had ended when its first layer ran.
        numbers: what modules state, and have to be told where units are taken away: these units are heads of attention.
    """

    members: tuple[Member, ...]
    units: int
    pinned: str | None
    coupled: bool
    inputs: int
    segment: int
    numbers: tuple[Number, ...] = ()

    def layers(self, role: Role) -> tuple[str, ...]:
        return tuple(member.layer for member in self.members if member.role == role)


def bundle(units: int, wanted: int) -> int:
    """How many of a group's units are switched or taken away together: as many as wanted, or a half of that, a quarter
    and so on in groups so narrow that there would be fewer than four bundles."""
    while wanted > 1 and units // wanted < _FEWEST:
        wanted //= 2
    return max(1, wanted)
