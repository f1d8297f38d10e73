"""Slow checks at full size; `make sweep` runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import dynnet
from dynnet.backbone.counting import flop_counter
from dynnet.backbone.dry_run import trace
from dynnet.backbone.input_size import input_size_of
from tests.cases import enliven, leave_one_by_one, open_at_random
from tests.zeroing import assert_cut_is_zeroed


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
        with flop_counter() as counter:
            alone = model.predict(images[i : i + 1])
        assert alone.exit.item() == together.exit[i]
        assert counter.get_total_flops() == 2 * together.macs[i]


GATED = [
    "resnet50", "resnext50_32x4d", "seresnet50", "regnety_008", "mobilenetv3_large_100", "mobilenetv4_conv_small",
    "efficientnet_b0", "convnext_tiny", "convnextv2_tiny", "vit_small_patch16_224", "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224", "vgg16_bn", "densenet121", "cspresnet50", "hrnet_w18_small", "repvgg_a0",
    "resnetv2_50", "res2net50_26w_4s", "xception41", "inception_v3", "dpn68", "mnasnet_100", "ghostnet_100",
    "rexnet_100", "nf_resnet50", "selecsls42b", "dla34", "vovnet39a", "mixer_s16_224", "gmixer_24_224",
    "pit_ti_224", "poolformer_s12", "coat_lite_tiny", "crossvit_9_240", "maxvit_tiny_tf_224", "mobilevit_s",
    "edgenext_small", "gcvit_tiny", "levit_128", "visformer_tiny", "deit_small_patch16_224", "beit_base_patch16_224",
    "efficientnet_b0_gn", "resnetv2_50d_gn", "starnet_s1", "efficientformer_l1", "tiny_vit_5m_224",
]  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("name", GATED)
@torch.no_grad()
def test_skipped_equals_masked_at_full_size(name: str) -> None:
    backbone = timm.create_model(name, num_classes=100).eval()
    enliven(backbone)
    # In double, where rounding does not turn a decision over.
    model = dynnet.wrap(backbone.double(), [], gates="channel")
    images = torch.randn(6, *model.input_size, dtype=torch.float64)
    for bias in (-2.0, 0.0, 2.0):
        open_at_random(model, bias=bias)
        model.execution = "masked"
        masked = model.predict(images)
        model.execution = "sparse"
        together = model.predict(images)
        assert (together.logits - masked.logits).abs().max() <= 1e-4 * masked.logits.abs().max()
        for i in range(6):
            alone = model.predict(images[i : i + 1])
            assert (alone.logits[0] - masked.logits[i]).abs().max() <= 1e-4 * masked.logits[i].abs().max()
            assert alone.macs[0] == masked.macs[i]


PRUNED = [
    *GATED,
    "lcnet_050", "tinynet_e", "mobileone_s0", "fastvit_t8", "repghostnet_050", "hgnet_tiny", "pvt_v2_b0",
    "twins_pcpvt_small", "xcit_nano_12_p16_224", "mvitv2_tiny", "inception_next_atto", "rdnet_tiny", "convmixer_768_32",
    "efficientvit_b0", "davit_tiny", "focalnet_tiny_srf", "resmlp_12_224", "swiftformer_xs", "fasternet_t0", "shvit_s1",
    "repvit_m1", "cait_xxs24_224", "caformer_s18", "efficientvim_m1",
]  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("name", PRUNED)
def test_cut_is_zeroed_at_full_size(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    enliven(model)
    size = (3, 96, 96)
    try:
        trace(model, size, 2)
    except (RuntimeError, AssertionError, ValueError, TypeError):
        size = input_size_of(model)
    assert assert_cut_is_zeroed(model.double(), size) > 0


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["resnet50", "mobilenetv3_large_100", "convnext_tiny", "vit_small_patch16_224"])
@torch.no_grad()
def test_a_pruned_file_answers_the_same_in_a_new_process(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    enliven(model)
    images = torch.randn(2, *input_size_of(model))
    pruned = dynnet.prune(model, macs=0.5, criterion="l1")
    save_file({"images": images, "pruned": pruned(images)}, tmp_path / "expected.safetensors")
    dynnet.save(pruned, tmp_path / "pruned.safetensors")
    code = (
        "import sys, torch, dynnet\n"
        "from pathlib import Path\n"
        "from safetensors.torch import load_file\n"
        "here = Path(sys.argv[1])\n"
        "expected = load_file(here / 'expected.safetensors')\n"
        "with torch.no_grad():\n"
        "    found = dynnet.load(here / 'pruned.safetensors')(expected['images'])\n"
        "assert torch.equal(found, expected['pruned'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
