"""What operators do to labels: those that move entries move labels, sums tie them, and what is not known pins them.

Every rule is called as rule(labels, func, args, kwargs, output) after the operator ran; one of its inputs has labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dynnet.channels.labels import FREE, Labels, settled, varies

aten = torch.ops.aten

Rule = Callable[[Labels, Any, Any, Any, Any], None]


def rule_of(func: Any) -> Rule:
    """What an operator does to labels."""
    packet = func._overloadpacket
    if packet in _RULES:
        return _RULES[packet]
    if torch.Tag.reduction in func.tags:
        return _reduced
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    return _refuse


def _refuse(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor):
            labels.pin(labels.of(x), _told(labels, func))


def _told(labels: Labels, func: Any) -> str:
    return f"{func._overloadpacket.__name__} in {labels.where()}"


def _pointwise(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    result: Tensor | None = None
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    for x in operands:
        label = labels.of(x)
        if label is None:
            continue
        if result is None:
            result = label
            continue
        labels.tie(result, label)
        a, b = torch.broadcast_tensors(result, label)
        result = torch.where(a >= 0, a, b)
    assert result is not None
    numbers = tuple(float(x) for x in tree_leaves((args, kwargs)) if type(x) in (int, float))
    if numbers:
        labels.numbers.append((numbers, result[result >= 0].flatten(), labels.where()))
    for x in operands:
        if labels.of(x) is None and any(
            x.shape[-d] > 1 and result.shape[-d] > 1 for d in range(1, min(x.ndim, result.ndim) + 1)
        ):
            labels.pin(result, f"{_told(labels, func)} with a tensor of their number")
    for out in tree_leaves(output):
        if isinstance(out, Tensor) and out.ndim >= result.ndim:
            labels.set(out, result.view((1,) * (out.ndim - result.ndim) + result.shape))


def _moved(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Operators that only move entries: the same is done to the labels."""
    x = args[0]
    label = labels.of(x)
    assert label is not None
    full = label.expand(x.shape)
    if func._overloadpacket in (aten.view, aten._unsafe_view):
        moved: Any = _reshaped(label, x.shape, output.shape)
    elif func._overloadpacket is aten.as_strided_:
        if output.shape != full.shape:
            return _refuse(labels, func, args, kwargs, output)
        moved = full  # another layout of the same entries
    else:
        moved = func(full, *args[1:], **kwargs)
    parts = [settled(part) for part in ([moved] if isinstance(moved, Tensor) else moved)]
    by_head = labels.in_heads() and (varies(label) > 1 or any(varies(part) > 1 for part in parts))
    whole = _by_head(labels, label, parts) if by_head else _in_order(labels, label, parts)
    if not whole:
        labels.pin(label, _told(labels, func))
    for out, part in zip([output] if isinstance(output, Tensor) else output, parts, strict=True):
        labels.set(out, part)
    return None


def _in_order(labels: Labels, label: Tensor, parts: Sequence[Tensor]) -> bool:
    """Are all channels there, in the order in which they were? Ties equal parts of them."""
    order = label.flatten()
    if len(parts) > 1 and _alike(parts):
        # A forward that asks for halves gets halves of what is left, if both lose the same.
        _tie_all(labels, parts)
        return varies(label) != 1 or torch.equal(torch.cat([part.flatten() for part in parts]), order)
    return not any(varies(part) > 1 or not torch.equal(part.flatten(), order) for part in parts)


def _by_head(labels: Labels, label: Tensor, parts: Sequence[Tensor]) -> bool:
    """Channels laid out by head; a rehearsal shows whether they all come back. Ties equal parts of them."""
    labels.heads.setdefault(labels.where(), []).append(label[label >= 0].flatten())
    if _alike(parts):
        _tie_all(labels, parts)
    return len(parts) > 1 or torch.equal(parts[0].unique(), label.unique())


def _alike(parts: Sequence[Tensor]) -> bool:
    return all(part.shape == parts[0].shape for part in parts)


def _tie_all(labels: Labels, parts: Sequence[Tensor]) -> None:
    for part in parts[1:]:
        labels.tie(parts[0], part)


def _multiplied(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A batch of matrix products, (b, n, k) x (b, k, m): what is summed over lives and dies together."""
    found: Tensor | None = None
    for x, summed in ((args[0], 2), (args[1], 1)):
        label = labels.of(x)
        if label is None:
            continue
        if not labels.in_heads():
            return _refuse(labels, func, args, kwargs, output)
        first = label.narrow(summed, 0, 1)
        labels.tie(label, first)
        if found is not None:
            labels.tie(found, first)
            # Channels of the second go on; all of a head are tied to the first's already.
            a, b = torch.broadcast_tensors(found, first)
            first = torch.where(b >= 0, b, a)
        found = first
    assert found is not None
    if any(labels.of(x) is None and x.shape[0] > 1 < found.shape[0] for x in args[:2]):
        labels.pin(found, f"{_told(labels, func)} with a tensor of their number")
    return labels.set(output, found)


def _joined(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.ndim
    tensors = [x for x in tensors if x.numel()]
    given = [labels.of(x) for x in tensors]
    there = [label for label in given if label is not None]
    if all(label.shape[dim] == 1 for label in there) and any(varies(label) for label in there):
        # Side by side in another dimension than that of the channels: the same channels go on.
        if len(there) < len(given):
            every = torch.cat([x.flatten() for x in there])
            labels.pin(every, f"{_told(labels, func)} with a tensor of their number")
        _tie_all(labels, there)
        return labels.set(output, there[0])
    common = [1] * output.ndim
    for label in there:
        common = [max(a, b) for a, b in zip(common, label.shape, strict=True)]
    parts = []
    for x, its in zip(tensors, given, strict=True):
        common[dim] = x.shape[dim]
        parts.append((torch.full((1,) * x.ndim, FREE) if its is None else its).expand(common))
    return labels.set(output, torch.cat(parts, dim))


def _reduced(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    given, x = _named(func, args, kwargs), args[0]
    label = labels.of(x)
    if label is None:
        return _refuse(labels, func, args, kwargs, output)
    dims = given.get("dim")
    dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % x.ndim for d in dims]
    if any(label.shape[d] > 1 for d in dims):
        return _refuse(labels, func, args, kwargs, output)
    for out in tree_leaves(output):
        labels.set(out, label.squeeze(dims) if out.ndim < x.ndim else label)
    return None


def _spatial(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Operators on the last dimensions of maps, channel by channel."""
    label = labels.of(args[0])
    if label is None or any(size > 1 for size in label.shape[2:]) or args[0].ndim < 4:
        return _refuse(labels, func, args, kwargs, output)
    for out in tree_leaves(output):
        if isinstance(out, Tensor):
            labels.set(out, label)
    return None


def _padded(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    x, pads = args[0], args[1]
    label = labels.of(x)
    assert label is not None
    for i in range(0, len(pads), 2):
        if label.shape[x.ndim - 1 - i // 2] > 1 and (pads[i] or pads[i + 1]):
            return _refuse(labels, func, args, kwargs, output)
    return labels.set(output, label)


def _turned(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Operators along some dimensions (`roll`, `flip`), harmless where labels do not change along them."""
    given, label = _named(func, args, kwargs), labels.of(args[0])
    dims = given.get("dims", given.get("dim"))
    along = [dims] if isinstance(dims, int) else dims
    if label is None or along is None or any(label.shape[d] > 1 for d in along):
        return _refuse(labels, func, args, kwargs, output)
    return labels.set(output, label)


def _normed(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A layer norm: mixes what it normalises over."""
    label = labels.of(args[0])
    if label is None or any(size > 1 for size in label.shape[args[0].ndim - len(args[1]) :]):
        return _refuse(labels, func, args, kwargs, output)
    return labels.set(output[0], label)


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call, by name."""
    return {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs


def _reshaped(label: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels of a tensor of shape `before` that is given the shape `after`."""
    if varies(label) == 1:
        # Where that dimension stays, the rest need not be written out.
        old = next(d for d, size in enumerate(label.shape) if size > 1)
        place = math.prod(before[:old])
        for new, size in enumerate(after):
            if size == before[old] and math.prod(after[:new]) == place:
                return label.view([-1 if d == new else 1 for d in range(len(after))])
    return label.expand(before).reshape(after)


_RULES: dict[Any, Rule] = {
    aten.cat: _joined,
    aten.constant_pad_nd: _padded,
    aten.native_layer_norm: _normed,
    aten.bmm: _multiplied,
    **dict.fromkeys(
        (
            aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze,
            aten.select, aten.expand, aten.unbind, aten.split, aten.split_with_sizes, aten.slice, aten.alias,
            aten.detach, aten.repeat, aten.as_strided_,
        ),
        _moved,
    ),
    **dict.fromkeys(
        (
            aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d,
            aten.adaptive_max_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
            aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.reflection_pad2d,
            aten.replication_pad2d,
        ),
        _spatial,
    ),
    **dict.fromkeys((aten._softmax, aten._log_softmax, aten._safe_softmax, aten.cumsum), _reduced),
    **dict.fromkeys((aten.roll, aten.flip), _turned),
    **dict.fromkeys(
        (aten._prelu_kernel, aten.native_dropout, aten._to_copy, aten.clone, aten.hardswish, aten.hardswish_),
        _pointwise,
    ),
}  # fmt: skip
