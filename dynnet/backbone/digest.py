"""A fingerprint of numbers: the same tensors under the same names have the same one, on any device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text, and names, types, shapes and bytes of tensors, as 64 hexadecimal digits."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name].detach()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
