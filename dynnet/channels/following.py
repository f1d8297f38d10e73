"""Following channels through a model.

A dry run on the meta device carries, beside every tensor, a label for each of its entries: the channel it belongs to. A
convolution, linear layer or batch norm gives its channels labels of their own; operators hand labels on; where two
labelled tensors are added, their channels are tied. Nothing is known of families of models.

What mixes channels in an unknown way (a softmax over channels) or needs their number (a reshape into heads) pins them.
A second run in which some channels are missing shows whether the forward between the layers goes along with that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynnet.backbone.layers.table import channel_dim, effect_of, weighing_kind
from dynnet.backbone.meta import run_on_meta
from dynnet.backbone.owners import Owners
from dynnet.channels.labels import FREE, Labels
from dynnet.channels.operators import rule_of

Role = Literal["produces", "passes", "mixes", "reads"]


class Slot(NamedTuple):
    """One side of one layer: its channels have the labels first .. first + width - 1."""

    first: int
    width: int
    pixels: int
    order: int  # of the layer's call
    segment: int  # modules that something else reads, and that had ended before


class Kept(NamedTuple):
    """One side of one layer, narrowed."""

    channels: Tensor  # (k,) int64, ascending
    width: int  # of the whole layer


class Tracer(TorchDispatchMode):
    """Watches a forward, layer by layer and operator by operator.

    Attributes:
        labels: of all tensors.
        slots: sides of layers, in the order in which they were met.
        atoms: how many labels there are.
        macs: of every layer that ran, in order.
        grouped: names of grouped convolutions.
        suspects: labels of what the operator read that failed.

    A forward may be followed a second time, in train mode, where other layers may run. They get no labels of their own:
    what they read stays.
    """

    def __init__(self, seen: Collection[str], kept: Mapping[tuple[str, Role], Kept], owners: Owners) -> None:
        """A run to be followed.

        Args:
            seen: modules whose output something else reads as well; its channels are pinned.
            kept: sides of layers that are narrowed.
            owners: of the model's tensors; a layer that is not all that uses its own is pinned.
        """
        super().__init__()
        self.labels = Labels()
        self.slots: dict[tuple[str, Role], Slot] = {}
        self.atoms = 0
        self.macs: list[int] = []
        self.grouped: set[str] = set()
        self.suspects: list[Tensor] = []
        self._seen, self._narrow, self._owners = seen, kept, owners
        self._segment = 0
        self._called: set[tuple[str, Role]] = set()  # sides of layers, in this forward
        self._known: frozenset[str] | None = None  # layers that ran in the first, while the second runs
        self._inside = 0  # layers whose operators are known as a whole
        self._incoming: Tensor | None = None  # of the outermost of them
        self._more = False  # is it called with more than that?

    def counted(self, narrow: Tracer) -> list[tuple[Tensor, str]]:
        """Labels that met another number when run narrow: it was computed from how many there are; and where."""
        return [
            (labels, where)
            for (before, _, _), (after, labels, where) in zip(self.labels.numbers, narrow.labels.numbers, strict=False)
            if before != after
        ]

    def begin_again(self) -> None:
        """The forward begins anew, in train mode."""
        self._segment, self._inside = 0, 0
        self._called.clear()
        self.labels.running.clear()
        self._known = frozenset(name for name, _ in self.slots)

    # What layers do.

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self.labels.running.append((name, module))
            kind = effect_of(module)
            if kind is None:
                return None
            self._inside += 1
            if self._inside > 1:
                return None
            self._incoming = x = args[0]
            self._more = len(args) > 1 or bool(kwargs)
            kept = self._narrow.get((name, "reads" if kind == "weighs" else kind))
            if kept is None:
                return None
            dim = channel_dim(module, x)
            if x.shape[dim] != len(kept.channels):
                self._suspect(args)
                raise ValueError(f"{name} is given {x.shape[dim]} channels where {len(kept.channels)} are left")
            # The layer itself runs as it is; what is missing is taken from its output.
            return (_sized(x, dim, kept.width), *args[1:]), kwargs

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            kind = effect_of(module)
            narrowed = None
            if kind is not None:
                if self._inside == 1:
                    x = self._incoming
                    assert x is not None
                    kept = self._narrow.get((name, "produces" if kind == "weighs" else kind))
                    if kept is not None:
                        output = narrowed = _sized(output, channel_dim(module, x), len(kept.channels))
                    self._layer(name, module, x, output)
                self._inside -= 1
            if name in self._seen:
                self._segment += 1
                for x in tree_leaves(output):
                    if isinstance(x, Tensor):
                        self.labels.pin(self.labels.of(x), f"an exit reads them at {name}")
            self.labels.running.pop()
            return narrowed

        return hook

    def finish(self, output: Any) -> None:
        """The forward has ended with this answer."""
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self.labels.pin(self.labels.of(x), "they are the model's answer")
        for (name, _), slot in self.slots.items():
            if name in self._owners.others:
                self.labels.pin(torch.arange(slot.first, slot.first + slot.width), self._owners.others[name])

    def _layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        kind, dim = effect_of(module), channel_dim(module, x)
        weighs = weighing_kind(module) if kind == "weighs" else None
        self.macs.append(0 if weighs is None else weighs.macs(module, x, output))
        incoming = self._along(x, dim)
        if self._known is not None and name not in self._known:
            self.labels.pin(incoming, f"{name} reads them in training only")
            return
        if kind != "weighs":
            if (incoming >= 0).any():
                assert kind is not None
                passed = self._slot(name, kind, output, dim)
                self.labels.tie(passed, incoming)
                self.labels.set(output, passed, dim)
                self._pin_if_more(name, passed)
            return
        read = self._slot(name, "reads", x, dim)
        made = self._slot(name, "produces", output, dim)
        self.labels.tie(read, incoming)
        self._pin_if_more(name, torch.cat([read, made]))
        if not (incoming >= 0).any():
            self.labels.pin(read, "they are no layer's channels")
        groups = getattr(module, "groups", 1)
        if groups > 1:
            self.grouped.add(name)
        if groups > 1 and (name, "reads") not in self._narrow:
            for side in (read, made):
                whole = side.view(groups, -1)
                self.labels.tie(whole[:, :1].expand_as(whole), whole)
            self.labels.tie(read.view(groups, -1)[:, 0], made.view(groups, -1)[:, 0])
        self.labels.set(output, made, dim)

    def _pin_if_more(self, name: str, channels: Tensor) -> None:
        if self._more:
            self.labels.pin(channels, f"{name} is called with more than its input")

    def _slot(self, name: str, role: Role, x: Tensor, dim: int) -> Tensor:
        """The labels of the channels on one side of a layer; x has them along `dim`."""
        kept = self._narrow.get((name, role))
        width = x.shape[dim] if kept is None else kept.width
        again = (name, role) in self._called
        self._called.add((name, role))
        if (name, role) not in self.slots:
            pixels = x.numel() // (x.shape[0] * x.shape[dim])
            self.slots[name, role] = Slot(self.atoms, width, pixels, len(self.macs) - 1, self._segment)
            self.atoms += width
        first = self.slots[name, role].first
        atoms = first + (torch.arange(width) if kept is None else kept.channels)
        if again:
            self.labels.pin(atoms, f"{name} runs more than once")
        return atoms

    def _along(self, x: Tensor, dim: int) -> Tensor:
        """(C,) labels of x along one dimension; pins those that also change along another."""
        label = self.labels.of(x)
        size = x.shape[dim]
        if label is None:
            return torch.full((size,), FREE)
        if label.numel() != label.shape[dim]:
            self.labels.pin(label, f"they are spread over several dimensions before {self.labels.where()}")
            return torch.full((size,), FREE)
        return label.flatten().expand(size)

    # What operators do.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            output = run_on_meta(func, args, kwargs)
        except Exception:
            self._suspect((args, kwargs))
            raise
        # What a layer weighs with is no list.
        given = (*args, *kwargs.values()) if self._inside else tree_leaves((args, kwargs))
        inputs = [x for x in given if isinstance(x, Tensor)]
        self._owners.see(inputs, (name for name, _ in self.labels.running))
        if not self._inside and any(self.labels.of(x) is not None for x in inputs):
            rule_of(func)(self.labels, func, args, kwargs, output)
        return output

    def _suspect(self, given: Any) -> None:
        labels = [self.labels.of(x) for x in tree_leaves(given) if isinstance(x, Tensor)]
        self.suspects += [label[label >= 0].flatten() for label in labels if label is not None]


def _sized(x: Tensor, dim: int, size: int) -> Tensor:
    """A tensor like x, of another size along one dimension."""
    return x.new_empty([size if d == dim else length for d, length in enumerate(x.shape)])
