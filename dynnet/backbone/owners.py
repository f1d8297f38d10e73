"""Weights that more than their own layer uses.

A layer may be narrowed or folded where all that depends on its weights is its own forward. Two layers
may share one, though, and a forward may multiply by the weight of a layer that it does not call. The first can be seen
on the modules; the second shows in a dry run, in which an operator reads a layer's tensor while that layer is not
running.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from dynnet.backbone.layers.table import effect_of

# Modules of torch's that hand the weights of their layers to one fused operator, where numbers run without gradients;
# in a dry run they call the layers.
_FUSED = (nn.TransformerEncoderLayer,)


class Holder(NamedTuple):
    """Where a tensor is held: as what of which module."""

    module: str
    key: str

    def __str__(self) -> str:
        return f"{self.module}.{self.key}" if self.module else self.key


def holders(model: nn.Module) -> dict[int, list[Holder]]:
    """By the identity of every parameter and buffer, where it is held: several times, where it is shared."""
    found: dict[int, list[Holder]] = {}
    for name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found.setdefault(id(tensor), []).append(Holder(name, key))
    return found


class Owners:
    """Whose every tensor is, and who else uses it.

    Attributes:
        others: by layer of a known kind, who else uses its tensors, in words: it cannot be changed by itself.
        fused: by layer, which module of torch's may compute what it does without calling it, in words: it can be
            changed, but nothing can be told to it, nor stand in its place.
        read: whatever an operator has read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.others: dict[str, str] = {}
        self.fused: dict[str, str] = {}
        self.read: set[Holder] = set()
        self._holders = holders(model)
        self._parameters = {name for name, _ in model.named_parameters()}
        modules = dict(model.named_modules())
        self._layers = {name for name, module in modules.items() if effect_of(module) is not None}
        for places in self._holders.values():
            for place in places if len(places) > 1 else ():
                if place.module in self._layers:
                    other = next(p for p in places if p != place)
                    self.others.setdefault(place.module, f"the {place.key} of {place.module} is {other} as well")
        for name, module in modules.items():
            if isinstance(module, _FUSED):
                inside = [inner for inner, _ in module.named_modules(prefix=name) if inner in self._layers]
                self.fused |= dict.fromkeys(inside, f"{name} computes what is in it at once, without calling it")

    def see(self, tensors: Iterable[Tensor], running: Iterable[str]) -> None:
        """An operator reads these, while these modules run, the innermost last."""
        places = [place for tensor in tensors for place in self._holders.get(id(tensor), ())]
        if not places:
            return
        names = list(running)
        self.read.update(places)
        for place in places:
            if place.module in self._layers and place.module not in names:
                user = (names and names[-1]) or "the model itself"
                told = f"{user} uses the {place.key} of {place.module} without calling it"
                self.others.setdefault(place.module, told)

    def unread(self) -> bool:
        """Are there parameters that no operator has read? Those of auxiliary heads are read in training only."""
        return not self._parameters <= {str(place) for place in self.read}
