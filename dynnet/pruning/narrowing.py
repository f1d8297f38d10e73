"""Layers cut to the channels that stay, all that share them together. U units of a group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from dynnet.backbone.layers.table import cut_
from dynnet.backbone.subsets import Subset, subset
from dynnet.channels.following import Role
from dynnet.channels.groups import Group


def bound_units(model: nn.Module, group: Group) -> np.ndarray:
    """(U,) a number for each unit; units with the same one go together, so that group norms lose whole groups."""
    bound = np.arange(group.units)
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if isinstance(layer, nn.GroupNorm) and layer.num_groups > 1:
            of_channel = member.channels // (layer.num_channels // layer.num_groups)
            for number in np.unique(of_channel):
                touched = bound[(of_channel == number).any(1)]
                bound[np.isin(bound, touched)] = touched.min()
    return bound


def narrow_(model: nn.Module, groups: Sequence[Group], stay: Sequence[np.ndarray]) -> None:
    """Cut every layer to the channels that stay, in place.

    Args:
        model: whose groups they are.
        groups: without a reason to be left alone.
        stay: for each group (U,) bool, at least one.
    """
    there: dict[tuple[str, Role], np.ndarray] = {}
    for group, mask in zip(groups, stay, strict=True):
        for member in group.members:
            side = there.setdefault((member.layer, member.role), np.ones(member.width, dtype=bool))
            side[member.channels[~mask].ravel()] = False
    modules = dict(model.named_modules())
    for layer in dict.fromkeys(layer for layer, _ in there):
        left = {role: _subset(mask) for (name, role), mask in there.items() if name == layer}
        through = left.get("passes") or left.get("mixes")
        cut_(modules[layer], left.get("reads") or through, left.get("produces"))
    for group, mask in zip(groups, stay, strict=True):
        for number in group.numbers:
            setattr(modules[number.module], number.key, int(mask.sum()) * number.per_unit)


def _subset(there: np.ndarray) -> Subset | None:
    return None if there.all() else subset(torch.from_numpy(np.flatnonzero(there)), len(there))
