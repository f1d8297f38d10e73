"""Sparse tensors on disk: one bit for every entry, and the entries that are not zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

_BITS, _VALUES = ".bits", ".values"


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Tensors as they are written to disk, and the shapes of those that are packed, by name.

    Packed are those that are smaller so. A negative zero counts as a value: what is read back is the same, bit for bit.
    """
    packed: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().flatten()
        there = (flat != 0) | (flat.signbit() if flat.is_floating_point() else torch.zeros((), dtype=torch.bool))
        saved = int((~there).sum()) * flat.element_size()
        if saved <= math.ceil(len(flat) / 8):
            packed[name] = tensor
            continue
        shapes[name] = tuple(tensor.shape)
        packed[name + _BITS] = torch.from_numpy(np.packbits(there.numpy()))
        packed[name + _VALUES] = flat[there]
    return packed, shapes


def outline(packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """What `unpack` will give, the packed ones on the meta device, where they take no memory.

    Raises:
        ValueError: parts are missing, or do not fit each other.
    """
    tensors = {n: t for n, t in packed.items() if n.removesuffix(_BITS).removesuffix(_VALUES) not in shapes}
    for name, shape in shapes.items():
        bits, values = packed.get(name + _BITS), packed.get(name + _VALUES)
        if bits is None or values is None:
            raise ValueError(f"{name!r} has lost its bits or its values")
        count = math.prod(shape)
        whole = bits.dtype == torch.uint8 and bits.shape == (math.ceil(count / 8),) and values.ndim == 1
        spare = -count % 8  # bits of the last byte
        if not whole or np.bitwise_count(bits.numpy()).sum() != len(values) or (spare and int(bits[-1]) % 2**spare):
            raise ValueError(f"the bits and the values of {name!r} do not fit its shape {tuple(shape)}")
        tensors[name] = torch.empty(tuple(shape), dtype=values.dtype, device="meta")
    return tensors


def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """What `pack` was given.

    Raises:
        ValueError: as `outline`.
    """
    tensors = outline(packed, shapes)
    for name, shape in shapes.items():
        count = math.prod(shape)
        there = torch.from_numpy(np.unpackbits(packed[name + _BITS].numpy(), count=count).astype(bool))
        values = packed[name + _VALUES]
        tensors[name] = values.new_zeros(count).masked_scatter(there, values).view(tuple(shape))
    return tensors
