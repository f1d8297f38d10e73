"""Units of a group in another order: a network that computes the same, whose first units are those that matter most.

U units of a group, C channels of a layer
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from dynnet.backbone.layers.table import cut_
from dynnet.backbone.subsets import Subset
from dynnet.channels.following import Role
from dynnet.channels.groups import Group


def reorder_(model: nn.Module, groups: Sequence[Group], orders: Sequence[np.ndarray]) -> None:
    """Put the units of some groups into another order, in place, in all layers that share them.

    Args:
        model: whose groups they are.
        groups: without a reason to be left alone.
        orders: for each group (U,) int64, its units as they shall come.
    """
    sides: dict[tuple[str, Role], np.ndarray] = {}
    for group, order in zip(groups, orders, strict=True):
        for member in group.members:
            side = sides.setdefault((member.layer, member.role), np.arange(member.width))
            side[member.channels.ravel()] = member.channels[order].ravel()
    modules = dict(model.named_modules())
    for layer in dict.fromkeys(layer for layer, _ in sides):
        taken = {
            role: Subset(torch.from_numpy(side), 1, len(side)) for (name, role), side in sides.items() if name == layer
        }
        through = taken.get("passes") or taken.get("mixes")
        cut_(modules[layer], taken.get("reads") or through, taken.get("produces"))
