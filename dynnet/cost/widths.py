"""What a model costs with some of its channels gone, without building it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from dynnet.backbone.dry_run import trace
from dynnet.channels.groups import Group, Role

Side = tuple[str, Role]  # of a layer


class Costs:
    """What a model costs with some of its channels gone.

    Attributes:
        whole: with all of them.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], size: tuple[int, int, int], unit: str) -> None:
        """The costs of a model.

        Args:
            groups: whose units will go.
            size: (C, H, W) of the images.
            unit: "macs" of one sample, or "params".
        """
        modules = dict(model.named_modules())
        macs = trace(model, size, 1)  # some layers work once for a whole batch
        self.whole = macs.macs if unit == "macs" else sum(p.numel() for p in model.parameters())
        self._widths = {(m.layer, m.role): m.width for group in groups for m in group.members}
        self._terms: list[tuple[int, list[Side]]] = []
        for layer in dict.fromkeys(layer for layer, _ in self._widths):
            module = modules[layer]
            sides = [side for side in self._widths if side[0] == layer]
            # What makes group by group from what it reads shrinks once, with the number of groups.
            both = sides[:1] if getattr(module, "groups", 1) > 1 else sides
            made = [side for side in sides if side[1] != "reads"]
            if unit == "macs":
                self._terms.append((macs.layers[layer], both))
                continue
            for name, parameter in module.named_parameters(recurse=False):
                self._terms.append((parameter.numel(), both if name == "weight" else made))
        for module_name, producer in _attention(groups).items():
            if unit == "macs":  # products of queries, keys and values
                self._terms.append((macs.layers[module_name], [producer]))

    def without(self, gone: Mapping[Side, int]) -> float:
        """The cost where so many channels of some sides of layers are gone."""
        total = float(self.whole)
        for cost, sides in self._terms:
            total -= cost * (1 - math.prod(1 - gone.get(side, 0) / self._widths[side] for side in sides))
        return total


def _attention(groups: Sequence[Group]) -> dict[str, Side]:
    """Modules that work head by head, and a side whose channels are these heads'."""
    first = ((group, group.members[0]) for group in groups)
    return {number.module: (member.layer, member.role) for group, member in first for number in group.numbers}
