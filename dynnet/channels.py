"""Channel groups: which channels of which layers live and die together.

A dry run on the meta device carries, beside every tensor, a label for each of its entries: the channel it belongs to. A
convolution, linear layer or batch norm gives its channels labels of their own; operators hand labels on; where two
labelled tensors are added, their channels are tied. In the end every set of tied channels is a *unit* that can only be
taken away as a whole, and all units that touch the same layers form a *group*. Nothing is known of families of models.

What mixes channels in an unknown way (a softmax over channels) or needs their number (a reshape into heads) pins the
units that it reads: they cannot be narrowed, and the group says why.

    C channels of a layer, U units of a group, n channels of a layer that belong to one unit
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynnet.probe import evaluating, on_meta, watching

aten = torch.ops.aten

Role = Literal["produces", "passes", "mixes", "reads"]

_FREE = -1  # the label of what is no channel of any layer


@dataclass(frozen=True)
class Member:
    """One side of one layer, as part of a group.

    Attributes:
        layer: name of the module.
        role: "produces" channels (a convolution's or linear layer's outputs), "passes" them on one by one (batch norm,
            depthwise convolution), "mixes" them (layer norm, global response norm: passes them on, but every one
            depends on all), or "reads" them (a convolution's or linear layer's inputs).
        channels: (U, n) int64, the layer's channels that belong to each unit.
        width: C, of all channels on this side of the layer.
        pixels: positions at which the layer works, H * W or the tokens; 1 behind a pooling.
    """

    layer: str
    role: Role
    channels: np.ndarray
    width: int
    pixels: int


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
    """

    members: tuple[Member, ...]
    units: int
    pinned: str | None
    coupled: bool
    inputs: int
    segment: int

    def layers(self, role: Role) -> tuple[str, ...]:
        return tuple(member.layer for member in self.members if member.role == role)


def find_groups(model: nn.Module, input_size: tuple[int, ...], seen: Collection[str] = ()) -> list[Group]:
    """The channel groups of any model, in the order in which their first layers run.

    Args:
        model: takes one (B, *input_size) tensor.
        input_size: (C, H, W).
        seen: modules whose output something else reads as well, such as exits; their channels are pinned.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tracer, modules = _Tracer(seen), dict(model.named_modules())
    with on_meta(model), evaluating(model), torch.no_grad(), watching(modules, tracer.enter, tracer.leave):
        images = torch.empty(1, *input_size, dtype=dtype, device="meta")
        with tracer:
            output = model(images)
    for x in tree_leaves(output):
        if isinstance(x, Tensor):
            tracer.pin(tracer.label(x), "they are the model's answer")
    return tracer.groups()


class _Slot(NamedTuple):
    """One side of one layer: its channels have the labels first .. first + width - 1."""

    first: int
    width: int
    pixels: int
    order: int  # of the layer's call
    segment: int  # modules that something else reads, and that had ended before


class _Tracer(TorchDispatchMode):
    """Labels are kept as int64 tensors with as many dimensions as the tensor that they describe, of size 1 along those
    in which they do not change."""

    def __init__(self, seen: Collection[str]) -> None:
        super().__init__()
        self._seen = seen
        self._segment = 0
        self._labels: dict[int, Tensor] = {}
        self._held: list[Tensor] = []  # an identity may not be used twice
        self._slots: dict[tuple[str, Role], _Slot] = {}
        self._atoms = 0
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._pins: list[tuple[Tensor, str]] = []
        self._names: list[str] = []
        self._inside = 0  # layers whose operators are known as a whole
        self._macs: list[int] = []  # of every layer that ran, in order
        self._grouped: set[str] = set()  # grouped convolutions

    # What layers do.

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._names.append(name)
            self._inside += layer_kind(module) is not None

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if layer_kind(module) is not None:
                self._inside -= 1
                if not self._inside:
                    self._layer(name, module, args[0], output)
            if name in self._seen:
                self._segment += 1
                for x in tree_leaves(output):
                    if isinstance(x, Tensor):
                        self.pin(self.label(x), f"an exit reads them at {name}")
            self._names.pop()

        return hook

    def _layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        kind, dim = layer_kind(module), channel_dim(module, x)
        weight = getattr(module, "weight", None)
        self._macs.append(weight[0].numel() * output.numel() if kind == "weighs" and weight is not None else 0)
        incoming = self._along(x, dim)
        if kind != "weighs":
            if (incoming >= 0).any():
                passed = self._slot(name, "mixes" if kind == "mixes" else "passes", output, dim)
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
            self._grouped.add(name)
            for side in (read, made):
                whole = side.view(groups, -1)
                self._tie(whole[:, :1].expand_as(whole), whole)
            self._tie(read.view(groups, -1)[:, 0], made.view(groups, -1)[:, 0])
        self._set(output, made, dim)

    def _slot(self, name: str, role: Role, x: Tensor, dim: int) -> Tensor:
        width = x.shape[dim]
        if (name, role) in self._slots:
            known = self._slots[name, role]
            atoms = torch.arange(known.first, known.first + known.width)
            self.pin(atoms, f"{name} runs more than once")
            return atoms
        pixels = x.numel() // (x.shape[0] * width)
        self._slots[name, role] = _Slot(self._atoms, width, pixels, len(self._macs) - 1, self._segment)
        self._atoms += width
        return torch.arange(self._atoms - width, self._atoms)

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
        output = func(*args, **kwargs)
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
            self._ties.append((a[both], b[both]))

    def pin(self, label: Tensor | None, reason: str) -> None:
        if label is not None:
            self._pins.append((label[label >= 0].flatten(), reason))

    def _refuse(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.pin(self.label(x), f"{func._overloadpacket.__name__} in {self._where()}")

    def _where(self) -> str:
        return self._names[-1] if self._names and self._names[-1] else "the model itself"

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
        for x in operands:
            if self.label(x) is None and any(
                x.shape[-d] > 1 and result.shape[-d] > 1 for d in range(1, min(x.ndim, result.ndim) + 1)
            ):
                self.pin(result, f"{func._overloadpacket.__name__} in {self._where()} with a tensor of their number")
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
            moved: Any = full.reshape(output.shape)
        elif func._overloadpacket is aten.as_strided_:
            if output.shape != full.shape:
                return self._refuse(func, args, kwargs, output)
            moved = full  # another layout of the same entries
        else:
            moved = func(full, *args[1:], **kwargs)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        labels = [_settled(part) for part in ([moved] if isinstance(moved, Tensor) else moved)]
        order = label.flatten()
        if len(labels) == 2 and labels[0].shape == labels[1].shape:
            # Halves: a forward that asks for them gets halves of what is left, if both lose the same. The width of more
            # pieces is usually written down in its code (Res2Net).
            self._tie(*labels)
            order = torch.cat([part.flatten() for part in labels]) if _varies(label) == 1 else order
            if not torch.equal(order, label.flatten()):
                self.pin(label, f"{func._overloadpacket.__name__} in {self._where()}")
        elif any(_varies(part) > 1 or not torch.equal(part.flatten(), order) for part in labels):
            self.pin(label, f"{func._overloadpacket.__name__} in {self._where()}")
        for out, part in zip(outputs, labels, strict=True):
            self._set(out, part)
        return None

    def _joined(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.ndim
        tensors = [x for x in tensors if x.numel()]
        labels = [self.label(x) for x in tensors]
        common = [1] * output.ndim
        for label in labels:
            if label is not None:
                common = [max(a, b) for a, b in zip(common, label.shape, strict=True)]
        parts = []
        for x, label in zip(tensors, labels, strict=True):
            common[dim] = x.shape[dim]
            parts.append((torch.full((1,) * x.ndim, _FREE) if label is None else label).expand(common))
        self._set(output, torch.cat(parts, dim))

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

    # What follows from it.

    def groups(self) -> list[Group]:
        parent = _components(self._atoms, self._ties)
        reasons: dict[int, str] = {}
        for atoms, reason in self._pins:
            for unit in np.unique(parent[atoms.numpy()]):
                reasons.setdefault(int(unit), reason)
        # Every unit's signature: the sides of layers on which it has channels.
        sides = list(self._slots)
        touched: dict[int, list[int]] = {}
        for side, slot in enumerate(self._slots.values()):
            for unit in np.unique(parent[slot.first : slot.first + slot.width]):
                touched.setdefault(int(unit), []).append(side)
        together: dict[tuple[int, ...], list[int]] = {}
        for unit in sorted(touched):
            together.setdefault(tuple(touched[unit]), []).append(unit)
        return [self._group(signature, units, sides, parent, reasons) for signature, units in sorted(together.items())]

    def _group(
        self,
        signature: Sequence[int],
        units: Sequence[int],
        sides: Sequence[tuple[str, Role]],
        parent: np.ndarray,
        reasons: dict[int, str],
    ) -> Group:
        index = {unit: i for i, unit in enumerate(units)}
        pinned = next((reasons[unit] for unit in units if unit in reasons), None)
        members = []
        for side in signature:
            layer, role = sides[side]
            slot = self._slots[sides[side]]
            mine = parent[slot.first : slot.first + slot.width]
            channels = np.flatnonzero(np.isin(mine, units))
            owner = np.array([index[int(unit)] for unit in mine[channels]])
            count = np.bincount(owner, minlength=len(units))
            if (count != count[0]).any():
                pinned = pinned or f"units take different numbers of the channels of {layer}"
                positions = channels[None]
            else:
                positions = channels[np.argsort(owner, kind="stable")].reshape(len(units), -1)
            members.append(Member(layer, role, positions, slot.width, slot.pixels))
        first = self._slots.get((members[0].layer, "reads"), self._slots[sides[signature[0]]])
        coupled = self._is_coupled([sides[side] for side in signature])
        return Group(tuple(members), len(units), pinned, coupled, first.width, first.segment)

    def _is_coupled(self, sides: Sequence[tuple[str, Role]]) -> bool:
        slots = {side: self._slots[side] for side in sides}
        orders = {slot.order for slot in slots.values()}
        first, last = min(orders), max(orders)
        most = max(slot.pixels for slot in slots.values())
        reads = [slot.order for (_, role), slot in slots.items() if role == "reads"]
        for (layer, role), slot in slots.items():
            # Made by what has read it: a residual loop. Channel attention does so too, behind a pooling.
            pooled = slot.pixels == 1 < most
            if (
                role == "produces"
                and not pooled
                and layer not in self._grouped
                and any(order < slot.order for order in reads)
            ):
                return True
        own = sum(self._macs[order] for order in orders)
        return sum(self._macs[first : last + 1]) > 2 * own


def layer_kind(module: nn.Module) -> Literal["weighs", "passes", "mixes"] | None:
    """What a layer does to channels, None for modules that are followed op by op.

    A convolution or linear layer "weighs" its inputs; a depthwise one or a batch norm "passes" channels on one by one;
    a layer norm or global response norm "mixes" them.
    """
    if isinstance(module, nn.Conv2d):
        return "passes" if 1 < module.groups == module.in_channels == module.out_channels else "weighs"
    if isinstance(module, nn.Linear):
        return "weighs"
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d):
        return "passes"
    if isinstance(module, GlobalResponseNorm):
        return "mixes"
    if isinstance(module, nn.LayerNorm) and type(module) in (nn.LayerNorm, LayerNorm, LayerNorm2d):
        return "mixes" if len(module.normalized_shape) == 1 else None
    return None


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """The dimension of a layer's input that holds its channels."""
    last = isinstance(module, (nn.Linear, nn.LayerNorm)) and not isinstance(module, LayerNorm2d)
    if isinstance(module, GlobalResponseNorm):
        last = module.channel_dim == -1
    return x.ndim - 1 if last else 1


def _settled(label: Tensor) -> Tensor:
    """Without the dimensions along which it does not change."""
    for d in range(label.ndim):
        if label.shape[d] > 1 and (label.stride(d) == 0 or bool((label == label.narrow(d, 0, 1)).all())):
            label = label.narrow(d, 0, 1)
    return label.contiguous()


def _varies(label: Tensor) -> int:
    """Along how many dimensions a label changes."""
    return sum(size > 1 for size in label.shape)


def _components(count: int, ties: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
    """(count,) int64: for every atom the smallest one that it is tied to, over any number of steps."""
    parent = np.arange(count)
    if not ties:
        return parent
    a = torch.cat([x for x, _ in ties]).numpy()
    b = torch.cat([x for _, x in ties]).numpy()
    while True:
        low = np.minimum(parent[a], parent[b])
        before = parent.copy()
        # Hook the larger root to the smaller, then let everybody point at the root.
        np.minimum.at(parent, before[a], low)
        np.minimum.at(parent, before[b], low)
        while (parent[parent] != parent).any():
            parent = parent[parent]
        if (parent == before).all():
            return parent


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

_Rule = Callable[[_Tracer, Any, Any, Any, Any], None]


def _rule(func: Any) -> _Rule:
    packet = func._overloadpacket
    if packet in _MOVES:
        return _Tracer._moved
    if packet is aten.cat:
        return _Tracer._joined
    if packet is aten.constant_pad_nd:
        return _Tracer._padded
    if packet in _SPATIAL:
        return _Tracer._spatial
    if packet is aten.native_layer_norm:
        return _Tracer._normed
    if torch.Tag.reduction in func.tags or packet in _ALONG:
        return _Tracer._reduced
    if packet in (aten.roll, aten.flip):
        return _Tracer._kept
    if torch.Tag.pointwise in func.tags or packet in _POINTWISE:
        return _Tracer._pointwise
    return _Tracer._refuse
