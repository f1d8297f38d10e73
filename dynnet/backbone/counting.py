"""What counts multiply-adds: the price of every operator.

MACs are those of convolutions, matrix products and attention, as `torch.utils.flop_counter` counts them; FLOPs are
twice as many. Norms, activations, pooling and additions are free by the field's convention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

aten = torch.ops.aten

# Operators that multiply and add, but whose price nobody has told. They are named in a bill, never counted as zero.
_UNPRICED = {
    aten.mv, aten.dot, aten.vdot, aten.addmv, aten.addbmm, aten.addr, aten.ger,
    aten._fft_r2c, aten._fft_c2r, aten._fft_c2c,
    aten.grid_sampler_2d, aten.grid_sampler_3d, aten._native_multi_head_attention,
    aten.lstm, aten.gru, aten.mkldnn_rnn_layer, aten._trilinear, aten._cdist_forward,
    aten._embedding_bag, aten.embedding_bag, aten._convolution_mode, aten._thnn_fused_lstm_cell,
}  # fmt: skip


def macs_of(func: Any, args: Any, kwargs: Any, output: Any) -> int | None:
    """MACs of one call of an operator of torch.ops; None where it does arithmetic nobody has told the price of."""
    packet = func._overloadpacket
    if packet in flop_registry:
        # FLOPs are counted as two per multiply-add.
        return int(flop_registry[packet](*args, **kwargs, out_val=output) // 2)
    known = packet not in _UNPRICED and func.namespace in ("aten", "prims", "prim")
    return 0 if known else None


def flop_counter() -> FlopCounterMode:
    """PyTorch's own counter, of what really runs; that of 2.14 counts fused attention on CPUs as nothing."""
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    missing = {} if attention in flop_registry else {attention: _attention}
    return FlopCounterMode(display=False, custom_mapping=missing)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)
