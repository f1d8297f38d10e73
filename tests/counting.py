"""What PyTorch counts, as the yardstick of every bill."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter; that of 2.14 counts fused attention on CPUs as nothing."""
    missing = {} if _CPU_ATTENTION in flop_registry else {_CPU_ATTENTION: _attention}
    return FlopCounterMode(display=False, custom_mapping=missing)
