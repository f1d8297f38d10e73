"""Slow checks at full size; `make sweep` runs them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import dynnet
from dynnet.exits import input_size_of
from tests.cases import leave_one_by_one


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv3_small_100",
        "convnext_atto",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "crossvit_9_240",
    ],
)
@torch.no_grad()
def test_the_bill_of_64_mixed_samples_is_what_a_counter_sees(name: str) -> None:
    model = dynnet.wrap(timm.create_model(name).eval(), [1 / 3, 2 / 3])
    images = torch.randn(64, *input_size_of(model.backbone))
    leave_one_by_one(model, images)
    together = model.predict(images)
    assert together.exit.bincount(minlength=3).min() > 10
    for i in range(64):
        with FlopCounterMode(display=False) as counter:
            alone = model.predict(images[i : i + 1])
        assert alone.exit.item() == together.exit[i]
        assert counter.get_total_flops() == 2 * together.macs[i]
