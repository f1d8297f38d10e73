"""What the table of layer kinds knows of each. C channels of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dynnet.backbone.subsets import Subset

HALF = (torch.float16, torch.bfloat16)  # sums over channels or pixels are taken in single precision, or overflow

# What a layer does to channels. It "weighs" its inputs (convolution, linear layer); it "passes" channels on one by one
# (depthwise convolution, batch norm); it "mixes" them (layer norm): passes them on, but every one depends on others.
Effect = Literal["weighs", "passes", "mixes"]


class Kind(ABC):
    """One kind of layer. What it is asked about is a layer that it `matches`."""

    @abstractmethod
    def matches(self, layer: nn.Module) -> bool:
        """Is the layer of this kind? Where a subclass may do something else, only exact types are."""

    @abstractmethod
    def effect(self, layer: nn.Module) -> Effect: ...

    @abstractmethod
    def widths(self, layer: nn.Module) -> tuple[int, int]:
        """Channels that it makes and reads; what passes channels on makes those that it reads."""

    @abstractmethod
    def run(self, layer: nn.Module, x: Tensor, reads: Subset | None, makes: Subset | None) -> Tensor:
        """As `dynnet.backbone.layers.table.run`, where at least one of the two is given."""

    @abstractmethod
    def cut_(self, layer: nn.Module, reads: Subset | None, makes: Subset | None) -> None:
        """As `dynnet.backbone.layers.table.cut_`."""

    def channel_dim(self, layer: nn.Module, x: Tensor) -> int:
        """The dimension of a layer's input, and of its output, that holds the channels."""
        return 1


def own_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The class's: the instance's may be what asks."""
    return cast(Tensor, type(layer).forward(layer, x))


def replace_(layer: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Give a layer other tensors, of the kinds that it had: parameters that learn as before, or buffers."""
    for name, tensor in tensors.items():
        old = getattr(layer, name)
        if tensor is not None and tensor is not old:
            tensor = tensor.detach().clone()  # it may be a view of the old one
            setattr(layer, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def activated(layer: nn.Module, x: Tensor) -> Tensor:
    """With the dropout and the activation that timm's norms may hold."""
    timms: Any = layer
    return cast(Tensor, timms.act(timms.drop(x))) if hasattr(layer, "act") else x
