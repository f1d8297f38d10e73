"""Sparse tensors on disk: one bit for every entry, and the entries that are not zero."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_BITS, _VALUES = ".bits", ".values"


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Tensors as they are written to disk, and the shapes of those that are packed, by name.

    Packed are those that are smaller so. A negative zero counts as a value: what is read back is the same, bit for bit.
    """
    packed: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().flatten()
        there = (flat != 0) | (flat.signbit() if flat.is_floating_point() else torch.zeros((), dtype=torch.bool))
        saved = int((~there).sum()) * flat.element_size()
        if saved <= math.ceil(len(flat) / 8):
            packed[name] = tensor
            continue
        shapes[name] = list(tensor.shape)
        packed[name + _BITS] = torch.from_numpy(np.packbits(there.numpy()))
        packed[name + _VALUES] = flat[there]
    return packed, shapes


def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """What `pack` was given.

    Raises:
        KeyError, ValueError, RuntimeError: parts are missing, or do not fit each other.
    """
    tensors = {n: t for n, t in packed.items() if n.removesuffix(_BITS).removesuffix(_VALUES) not in shapes}
    for name, shape in shapes.items():
        count = math.prod(shape)
        there = torch.from_numpy(np.unpackbits(packed[name + _BITS].numpy(), count=count).astype(bool))
        values = packed[name + _VALUES]
        tensors[name] = values.new_zeros(count).masked_scatter(there, values).view(shape)
    return tensors
