"""In which precision the forwards of training run."""

from __future__ import annotations

import torch


def computes_bfloat16(device: torch.device) -> bool:
    """Does a device compute in bfloat16? A CPU without the instructions takes about ten times as long as in float32."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
