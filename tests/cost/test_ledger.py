"""Dry runs and prices."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import dynnet
from dynnet.backbone.counting import flop_counter
from dynnet.backbone.dry_run import BATCH, trace
from dynnet.errors import InputError
from tests.cases import tiny


def test_a_dry_run_leaves_the_model_alone() -> None:
    model = timm.create_model("coat_lite_tiny", img_size=64).train()  # shares modules between its blocks
    model.head.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, (3, 64, 64), BATCH)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.head.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_dry_run_puts_everything_back_after_a_failure() -> None:
    model = tiny()
    with pytest.raises(RuntimeError):
        trace(model, (5, 32, 32), 2)
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_plain_tensor_attributes_follow_to_meta() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(3, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.table).mean((2, 3))

    assert trace(Table(), (3, 8, 8), 2).output[0].shape == (2, 3)


def test_layers_add_up_to_the_whole() -> None:
    seen = trace(timm.create_model("test_vit", img_size=64), (3, 64, 64), 1)
    assert sum(seen.layers.values()) == seen.macs > 0
    with flop_counter() as counter, torch.no_grad():
        timm.create_model("test_vit", img_size=64).eval()(torch.randn(1, 3, 64, 64))
    assert counter.get_total_flops() == 2 * seen.macs


def test_what_cannot_be_priced_is_named() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.mix = nn.Sequential(_Fourier())
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.mix(self.conv(x)).mean((2, 3)))

    model = dynnet.wrap(Spectral(), ["conv"], input_size=(3, 8, 8))
    assert model.ledger().unpriced == {
        "aten._fft_r2c": ("backbone.mix.0",),
        "aten._fft_c2r": ("backbone.mix.0",),
    }


class _Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x), s=(8, 8))


def test_bills_rise_with_depth_and_spare_what_is_off() -> None:
    ledger = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32)).ledger()
    full, bare = ledger.bill([True, True]), ledger.bill([False, False])
    assert bare[-1] == ledger.dense == sum(segment.macs for segment in ledger.segments)
    assert (full.diff() > 0).all()
    assert (full - bare).tolist() == [ledger.heads[0], sum(ledger.heads), sum(ledger.heads)]


def test_a_size_that_cannot_run_is_told() -> None:
    model = dynnet.wrap(timm.create_model("test_vit", img_size=64), 1)
    with pytest.raises(InputError, match=r"cannot take images of size \(3, 63, 64\)"):
        model.ledger((3, 63, 64))
