"""What a model costs with some of its channels gone, without building it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import nn

from dynnet.backbone.dry_run import trace
from dynnet.channels.following import Role
from dynnet.channels.groups import Group


class Width(Protocol):
    """One side of a layer, whose channels can be fewer than `width`."""

    @property
    def width(self) -> int: ...


W = TypeVar("W", bound=Width)


@dataclass(frozen=True, eq=False)
class Narrowable(Generic[W]):
    """A part of a model whose cost is a product of the channels on its sides.

    Attributes:
        cost: with all channels: MACs of one sample, or parameters.
        sides: what it is a product of: both sides of a convolution; one where outputs are made group by group from
            inputs that live and die together (depthwise and grouped convolutions).
    """

    cost: int
    sides: tuple[W, ...]

    def at(self, channels: Callable[[W], Any]) -> Any:
        """The cost where `channels` tells how many channels of a side are there: a number, or (B,) of them."""
        unit, rest = divmod(self.cost, math.prod(side.width for side in self.sides))
        cost: Any = self.cost / math.prod(side.width for side in self.sides) if rest else unit
        for side in self.sides:
            cost = cost * channels(side)
        return cost


class LayerSide(NamedTuple):
    """One side of one layer, as channel groups name it."""

    layer: str
    role: Role
    width: int


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
        touched = dict.fromkeys(LayerSide(m.layer, m.role, m.width) for group in groups for m in group.members)
        self._parts: list[Narrowable[LayerSide]] = []
        for layer in dict.fromkeys(side.layer for side in touched):
            module = modules[layer]
            sides = tuple(side for side in touched if side.layer == layer)
            # What makes group by group from what it reads shrinks once, with the number of groups.
            both = sides[:1] if getattr(module, "groups", 1) > 1 else sides
            made = tuple(side for side in sides if side.role != "reads")
            if unit == "macs":
                self._parts.append(Narrowable(macs.layers[layer], both))
                continue
            for name, parameter in module.named_parameters(recurse=False):
                self._parts.append(Narrowable(parameter.numel(), both if name == "weight" else made))
        for module_name, producer in _attention(groups).items():
            if unit == "macs":  # products of queries, keys and values
                self._parts.append(Narrowable(macs.layers[module_name], (producer,)))

    def without(self, gone: Mapping[tuple[str, Role], int]) -> float:
        """The cost where so many channels of some sides of layers are gone."""
        saved = (part.cost - part.at(lambda side: side.width - gone.get(side[:2], 0)) for part in self._parts)
        return float(self.whole - sum(saved))


def _attention(groups: Sequence[Group]) -> dict[str, LayerSide]:
    """Modules that work head by head, and a side whose channels are these heads'."""
    first = ((group, group.members[0]) for group in groups)
    return {number.module: LayerSide(m.layer, m.role, m.width) for group, m in first for number in group.numbers}
