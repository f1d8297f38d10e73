"""Following channels through a model.

A dry run on the meta device carries, beside every tensor, a label for each of its entries: the channel it belongs to. A
convolution, linear layer or batch norm gives its channels labels of their own; operators hand labels on; where two
labelled tensors are added, their channels are tied. Nothing is known of families of models.

What mixes channels in an unknown way (a softmax over channels) or needs their number (a reshape into heads) pins them.
A second run in which some channels are missing shows whether the forward between the layers goes along with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynnet.layers import channel_dim, layer_kind

aten = torch.ops.aten

Role = Literal["produces", "passes", "mixes", "reads"]

_FREE = -1  # the label of what is no channel of any layer

# By what names modules of attention state how many heads they have, and how wide these are together.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
TOGETHER = ("attn_dim", "all_head_dim", "attn_channels", "inner_dim", "key_attn_dim", "val_attn_dim", "out_dim")


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
    """Labels are kept as int64 tensors with as many dimensions as the tensor that they describe, of size 1 along those
    in which they do not change.

    Attributes:
        slots: sides of layers, in the order in which they were met.
        atoms: how many labels there are.
        ties: labels that belong together, and the module whose forward ties them.
        pins: labels that cannot be taken away, and why.
        macs: of every layer that ran, in order.
        grouped: names of grouped convolutions.
        suspects: labels of what the operator read that failed.
        numbers: plain numbers that operators computed with, the labels they met, and the module, in running order.
        heads: by module that states a number of heads, the labels of what it has split into heads.
    """

    def __init__(self, seen: Collection[str], kept: Mapping[tuple[str, Role], Kept]) -> None:
        """A run to be followed.

        Args:
            seen: modules whose output something else reads as well; its channels are pinned.
            kept: sides of layers that are narrowed.
        """
        super().__init__()
        self.slots: dict[tuple[str, Role], Slot] = {}
        self.atoms = 0
        self.ties: list[tuple[Tensor, Tensor, str]] = []
        self.pins: list[tuple[Tensor, str]] = []
        self.macs: list[int] = []
        self.grouped: set[str] = set()
        self.suspects: list[Tensor] = []
        self.numbers: list[tuple[tuple[float, ...], Tensor, str]] = []
        self._seen, self._narrow = seen, kept
        self._segment = 0
        self._labels: dict[int, Tensor] = {}
        self._held: list[Tensor] = []  # an identity may not be used twice
        self.heads: dict[str, list[Tensor]] = {}
        self._names: list[str] = []
        self._running: list[nn.Module] = []
        self._inside = 0  # layers whose operators are known as a whole
        self._incoming: Tensor | None = None  # of the outermost of them

    def where(self) -> str:
        """The module whose forward is running."""
        return self._names[-1] if self._names and self._names[-1] else "the model itself"

    def counted(self, narrow: Tracer) -> list[tuple[Tensor, str]]:
        """Labels that met another number when run narrow: it was computed from how many there are; and where."""
        return [
            (labels, where)
            for (before, _, _), (after, labels, where) in zip(self.numbers, narrow.numbers, strict=False)
            if before != after
        ]

    # What layers do.

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self._names.append(name)
            self._running.append(module)
            kind = layer_kind(module)
            if kind is None:
                return None
            self._inside += 1
            if self._inside > 1:
                return None
            self._incoming = x = args[0]
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
            kind = layer_kind(module)
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
                        self.pin(self.label(x), f"an exit reads them at {name}")
            self._names.pop()
            self._running.pop()
            return narrowed

        return hook

    def _layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        kind, dim = layer_kind(module), channel_dim(module, x)
        weight = getattr(module, "weight", None)
        self.macs.append(weight[0].numel() * output.numel() if kind == "weighs" and weight is not None else 0)
        label = self.label(x)
        if kind == "mixes" and label is not None and _varies(label) > 1 and label.shape[dim] > 1 and self._in_heads():
            # Over each head by itself; the norm is of a head's width, and stays.
            self._tie(label, label.narrow(dim, 0, 1))
            self._set(output, label)
            return
        incoming = self._along(x, dim)
        if kind != "weighs":
            if (incoming >= 0).any():
                assert kind is not None
                passed = self._slot(name, kind, output, dim)
                self._tie(passed, incoming)
                self._set(output, passed, dim)
            return
        read = self._slot(name, "reads", x, dim)
        made = self._slot(name, "produces", output, dim)
        self._tie(read, incoming)
        if not (incoming >= 0).any():
            self.pin(read, "they are no layer's channels")
        groups = getattr(module, "groups", 1)
        if groups > 1:
            self.grouped.add(name)
        if groups > 1 and (name, "reads") not in self._narrow:
            for side in (read, made):
                whole = side.view(groups, -1)
                self._tie(whole[:, :1].expand_as(whole), whole)
            self._tie(read.view(groups, -1)[:, 0], made.view(groups, -1)[:, 0])
        self._set(output, made, dim)

    def _slot(self, name: str, role: Role, x: Tensor, dim: int) -> Tensor:
        """The labels of the channels on one side of a layer; x has them along `dim`."""
        kept = self._narrow.get((name, role))
        width = x.shape[dim] if kept is None else kept.width
        known = self.slots.get((name, role))
        if known is None:
            pixels = x.numel() // (x.shape[0] * x.shape[dim])
            self.slots[name, role] = Slot(self.atoms, width, pixels, len(self.macs) - 1, self._segment)
            self.atoms += width
        first = self.slots[name, role].first
        atoms = first + (torch.arange(width) if kept is None else kept.channels)
        if known is not None:
            self.pin(atoms, f"{name} runs more than once")
        return atoms

    def _along(self, x: Tensor, dim: int) -> Tensor:
        """(C,) labels of x along one dimension; pins those that also change along another."""
        label = self.label(x)
        size = x.shape[dim]
        if label is None:
            return torch.full((size,), _FREE)
        if label.numel() != label.shape[dim]:
            self.pin(label, f"they are spread over several dimensions before {self._names[-1]}")
            return torch.full((size,), _FREE)
        return label.flatten().expand(size)

    # What operators do.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            output = func(*args, **kwargs)
        except Exception:
            self._suspect((args, kwargs))
            raise
        if not self._inside:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if any(self.label(x) is not None for x in inputs):
                _rule(func)(self, func, args, kwargs, output)
        return output

    def label(self, x: Tensor) -> Tensor | None:
        return self._labels.get(id(x))

    def _set(self, x: Tensor, label: Tensor, dim: int | None = None) -> None:
        if dim is not None:
            label = label.view([-1 if d == dim else 1 for d in range(x.ndim)])
        if id(x) not in self._labels:
            self._held.append(x)
        self._labels[id(x)] = _settled(label)

    def _tie(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.ties.append((a[both], b[both], self.where()))

    def pin(self, label: Tensor | None, reason: str) -> None:
        if label is not None:
            self.pins.append((label[label >= 0].flatten(), reason))

    def _suspect(self, given: Any) -> None:
        labels = [self.label(x) for x in tree_leaves(given) if isinstance(x, Tensor)]
        self.suspects += [label[label >= 0].flatten() for label in labels if label is not None]

    def _refuse(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.pin(self.label(x), f"{func._overloadpacket.__name__} in {self.where()}")

    def _pointwise(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        result: Tensor | None = None
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in operands:
            label = self.label(x)
            if label is None:
                continue
            if result is None:
                result = label
                continue
            self._tie(result, label)
            a, b = torch.broadcast_tensors(result, label)
            result = torch.where(a >= 0, a, b)
        assert result is not None
        numbers = tuple(float(x) for x in tree_leaves((args, kwargs)) if type(x) in (int, float))
        if numbers:
            self.numbers.append((numbers, result[result >= 0].flatten(), self.where()))
        for x in operands:
            if self.label(x) is None and any(
                x.shape[-d] > 1 and result.shape[-d] > 1 for d in range(1, min(x.ndim, result.ndim) + 1)
            ):
                self.pin(result, f"{func._overloadpacket.__name__} in {self.where()} with a tensor of their number")
        for out in tree_leaves(output):
            if isinstance(out, Tensor) and out.ndim >= result.ndim:
                self._set(out, result.view((1,) * (out.ndim - result.ndim) + result.shape))

    def _moved(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Operators that only move entries: the same is done to the labels."""
        x = args[0]
        label = self.label(x)
        assert label is not None
        full = label.expand(x.shape)
        if func._overloadpacket in (aten.view, aten._unsafe_view):
            moved: Any = _reshaped(label, x.shape, output.shape)
        elif func._overloadpacket is aten.as_strided_:
            if output.shape != full.shape:
                return self._refuse(func, args, kwargs, output)
            moved = full  # another layout of the same entries
        else:
            moved = func(full, *args[1:], **kwargs)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        labels = [_settled(part) for part in ([moved] if isinstance(moved, Tensor) else moved)]
        order = label.flatten()
        if self._in_heads() and (_varies(label) > 1 or any(_varies(part) > 1 for part in labels)):
            # Channels laid out by head; a rehearsal shows whether they all come back.
            self.heads.setdefault(self.where(), []).append(label[label >= 0].flatten())
            order = torch.cat([part.flatten() for part in labels]).sort().values
            if len(labels) == 1 and not torch.equal(order.unique(), label.flatten().unique()):
                self.pin(label, f"{func._overloadpacket.__name__} in {self.where()}")
            for part in labels[1:] if all(part.shape == labels[0].shape for part in labels) else ():
                self._tie(labels[0], part)
            for out, part in zip(outputs, labels, strict=True):
                self._set(out, part)
            return None
        if len(labels) > 1 and all(part.shape == labels[0].shape for part in labels):
            # A forward that asks for halves gets halves of what is left, if both lose the same.
            for part in labels[1:]:
                self._tie(labels[0], part)
            order = torch.cat([part.flatten() for part in labels]) if _varies(label) == 1 else order
            if not torch.equal(order, label.flatten()):
                self.pin(label, f"{func._overloadpacket.__name__} in {self.where()}")
        elif any(_varies(part) > 1 or not torch.equal(part.flatten(), order) for part in labels):
            self.pin(label, f"{func._overloadpacket.__name__} in {self.where()}")
        for out, part in zip(outputs, labels, strict=True):
            self._set(out, part)
        return None

    def _in_heads(self) -> bool:
        """Does the module whose forward is running state a number of heads?"""
        return any(isinstance(vars(self._running[-1]).get(key), int) for key in HEADS) if self._running else False

    def _multiplied(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """A batch of matrix products, (b, n, k) x (b, k, m): what is summed over lives and dies together."""
        found: Tensor | None = None
        for x, summed in ((args[0], 2), (args[1], 1)):
            label = self.label(x)
            if label is None:
                continue
            if not self._in_heads():
                return self._refuse(func, args, kwargs, output)
            first = label.narrow(summed, 0, 1)
            self._tie(label, first)
            if found is not None:
                self._tie(found, first)
                # Channels of the second go on; all of a head are tied to the first's already.
                a, b = torch.broadcast_tensors(found, first)
                first = torch.where(b >= 0, b, a)
            found = first
        assert found is not None
        if any(self.label(x) is None and x.shape[0] > 1 < found.shape[0] for x in args[:2]):
            self.pin(found, f"{func._overloadpacket.__name__} in {self.where()} with a tensor of their number")
        return self._set(output, found)

    def _joined(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.ndim
        tensors = [x for x in tensors if x.numel()]
        labels = [self.label(x) for x in tensors]
        there = [label for label in labels if label is not None]
        if all(label.shape[dim] == 1 for label in there) and any(_varies(label) for label in there):
            # Side by side in another dimension than that of the channels: the same channels go on.
            if len(there) < len(labels):
                self.pin(
                    torch.cat([x.flatten() for x in there]), f"cat in {self.where()} with a tensor of their number"
                )
            for label in there[1:]:
                self._tie(there[0], label)
            return self._set(output, there[0])
        common = [1] * output.ndim
        for label in there:
            common = [max(a, b) for a, b in zip(common, label.shape, strict=True)]
        parts = []
        for x, its in zip(tensors, labels, strict=True):
            common[dim] = x.shape[dim]
            parts.append((torch.full((1,) * x.ndim, _FREE) if its is None else its).expand(common))
        self._set(output, torch.cat(parts, dim))
        return None

    def _reduced(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        x = args[0]
        label = self.label(x)
        if label is None:
            return self._refuse(func, args, kwargs, output)
        dims = given.get("dim")
        dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        dims = [d % x.ndim for d in dims]
        if any(label.shape[d] > 1 for d in dims):
            return self._refuse(func, args, kwargs, output)
        for out in tree_leaves(output):
            if out.ndim < x.ndim:
                self._set(out, label.squeeze(dims))
            else:
                self._set(out, label)
        return None

    def _spatial(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Operators on the last dimensions of maps, channel by channel."""
        label = self.label(args[0])
        if label is None or any(size > 1 for size in label.shape[2:]) or args[0].ndim < 4:
            return self._refuse(func, args, kwargs, output)
        for out in tree_leaves(output):
            if isinstance(out, Tensor):
                self._set(out, label)
        return None

    def _padded(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        x, pads = args[0], args[1]
        label = self.label(x)
        assert label is not None
        for i in range(0, len(pads), 2):
            if label.shape[x.ndim - 1 - i // 2] > 1 and (pads[i] or pads[i + 1]):
                return self._refuse(func, args, kwargs, output)
        self._set(output, label)
        return None

    def _kept(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Operators along some dimensions (`roll`, `flip`), harmless where labels do not change along them."""
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        label = self.label(args[0])
        dims = given.get("dims", given.get("dim"))
        if (
            label is None
            or dims is None
            or any(label.shape[d] > 1 for d in ([dims] if isinstance(dims, int) else dims))
        ):
            return self._refuse(func, args, kwargs, output)
        self._set(output, label)
        return None

    def _normed(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """A layer norm: mixes what it normalises over."""
        label = self.label(args[0])
        if label is None or any(size > 1 for size in label.shape[args[0].ndim - len(args[1]) :]):
            return self._refuse(func, args, kwargs, output)
        self._set(output[0], label)
        return None


def _sized(x: Tensor, dim: int, size: int) -> Tensor:
    """A tensor like x, of another size along one dimension."""
    return x.new_empty([size if d == dim else length for d, length in enumerate(x.shape)])


def _settled(label: Tensor) -> Tensor:
    """Without the dimensions along which it does not change."""
    for d in range(label.ndim):
        if label.shape[d] > 1 and label.stride(d) == 0:
            label = label.narrow(d, 0, 1)
    for d in range(label.ndim):
        if label.shape[d] > 1 and bool((label == label.narrow(d, 0, 1)).all()):
            label = label.narrow(d, 0, 1)
    return label.contiguous()


def _reshaped(label: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels of a tensor of shape `before` that is given the shape `after`."""
    if _varies(label) == 1:
        # Where that dimension stays, the rest need not be written out.
        old = next(d for d, size in enumerate(label.shape) if size > 1)
        place = math.prod(before[:old])
        for new, size in enumerate(after):
            if size == before[old] and math.prod(after[:new]) == place:
                return label.view([-1 if d == new else 1 for d in range(len(after))])
    return label.expand(before).reshape(after)


def _varies(label: Tensor) -> int:
    """Along how many dimensions a label changes."""
    return sum(size > 1 for size in label.shape)


_MOVES = {
    aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.select,
    aten.expand, aten.unbind, aten.split, aten.split_with_sizes, aten.slice, aten.alias, aten.detach, aten.repeat,
    aten.as_strided_,
}  # fmt: skip
_SPATIAL = {
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d,
    aten.adaptive_max_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
    aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.reflection_pad2d, aten.replication_pad2d,
}  # fmt: skip
_ALONG = {aten._softmax, aten._log_softmax, aten._safe_softmax, aten.cumsum}
_POINTWISE = {aten._prelu_kernel, aten.native_dropout, aten._to_copy, aten.clone, aten.hardswish, aten.hardswish_}

_Rule = Callable[[Tracer, Any, Any, Any, Any], None]


def _rule(func: Any) -> _Rule:
    packet = func._overloadpacket
    if packet in _MOVES:
        return Tracer._moved
    if packet is aten.cat:
        return Tracer._joined
    if packet is aten.constant_pad_nd:
        return Tracer._padded
    if packet in _SPATIAL:
        return Tracer._spatial
    if packet is aten.native_layer_norm:
        return Tracer._normed
    if torch.Tag.reduction in func.tags or packet in _ALONG:
        return Tracer._reduced
    if packet in (aten.roll, aten.flip):
        return Tracer._kept
    if packet is aten.bmm:
        return Tracer._multiplied
    if torch.Tag.pointwise in func.tags or packet in _POINTWISE:
        return Tracer._pointwise
    return Tracer._refuse
