"""Channels taken away for good."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynnet
from dynnet.backbone.dry_run import trace
from dynnet.channels.finding import find_groups
from dynnet.cost.widths import Costs
from dynnet.errors import CheckpointError, DataError, PruneError
from dynnet.pruning import choosing, sparsify_
from dynnet.pruning.narrowing import narrow_
from dynnet.pruning.timed import time_share
from tests.cases import CASES, CHAIN, CHANNELWISE, CLASSES, Case, chain, channelwise, enliven
from tests.generated import PARTS, Generated
from tests.zeroing import assert_cut_is_zeroed

# The others take long; `make sweep` has them, and more.
QUICK = [
    case
    for case in CASES
    if case.name
    not in {"selecsls42b", "hrnet_w18_small", "caformer_s18", "mixer_s32_224", "efficientvim_m1", "crossvit_9_240"}
]
# Its halves are cut out by numbers written down in its code.
STUBBORN = {"test_mambaout": 0.92}


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_cut_is_zeroed(case: Case) -> None:
    model = case.backbone().double()
    enliven(model)
    assert assert_cut_is_zeroed(model, case.size) > 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4),
    width=st.sampled_from([8, 16, 24]),
    seed=st.integers(0, 1000),
)
def test_cut_is_zeroed_on_any_network(parts: list[str], width: int, seed: int) -> None:
    model = Generated(parts, width, seed).eval().double()
    enliven(model, seed)
    assert assert_cut_is_zeroed(model, (3, 16, 16), seed) > 0


@pytest.mark.parametrize("kind", CHANNELWISE)
def test_cut_equals_zeroed_behind_every_kind_that_passes_channels_on(kind: str) -> None:
    assert assert_cut_is_zeroed(channelwise(kind).double(), CHAIN) == 2


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_pruned_models_cost_what_was_asked_for_and_learn(case: Case, tmp_path: Path) -> None:
    model = case.backbone()
    whole = trace(model, case.size, 1).macs
    target = STUBBORN.get(case.name, 0.6)
    pruned = dynnet.prune(model, macs=target, criterion="l2", multiple=4, input_size=case.size)
    assert target - 0.1 < trace(pruned, case.size, 1).macs / whole <= target
    assert trace(model, case.size, 1).macs == whole
    images = case.images(3)
    pruned.train()(images).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())

    dynnet.save(pruned, tmp_path / "thin.safetensors", {"model_name": case.name, "num_classes": CLASSES, **case.kwargs})
    again = dynnet.load(tmp_path / "thin.safetensors")
    with torch.no_grad():
        assert torch.equal(again(images), pruned.eval()(images))
    assert {k: v for k, v in vars(again).items() if type(v) in (int, list)} == {
        k: v for k, v in vars(pruned).items() if type(v) in (int, list)
    }


def test_the_units_worth_most_stay() -> None:
    model = chain()
    with torch.no_grad():
        for unit in (3, 7, 8, 12):
            model[0].weight[unit] *= 10
            model[3].weight[:, unit] *= 10
    pruned = dynnet.prune(model, macs=0.3, criterion="l1", scope="group", multiple=4, exclude=["7"], input_size=CHAIN)
    assert torch.equal(pruned[0].weight, model[0].weight[[3, 7, 8, 12]])
    assert torch.equal(pruned[1].running_mean, model[1].running_mean[[3, 7, 8, 12]])
    assert torch.equal(pruned[3].weight, model[3].weight[:, [3, 7, 8, 12]])
    assert pruned[7].in_features == 32


def test_shares_of_each_group_or_a_ranking_over_all() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[8:] = 1e-3 * torch.randn_like(model[0].weight[8:])  # half of one group is worth nothing
        model[3].weight[:, 8:] = 1e-3 * torch.randn_like(model[3].weight[:, 8:])
    uniform = dynnet.prune(model, macs=0.5, criterion="l1", scope="group", multiple=1, input_size=CHAIN)
    assert abs(uniform[0].out_channels / 16 - uniform[3].out_channels / 32) <= 1 / 16
    ranked = dynnet.prune(model, macs=0.5, criterion="l1", multiple=1, input_size=CHAIN)
    assert ranked[0].out_channels <= 8
    assert ranked[3].out_channels > 24


def test_widths_stay_multiples_and_above_their_floor() -> None:
    model = chain(64)
    for share in (0.7, 0.3, 0.1):
        pruned = dynnet.prune(model, macs=share, criterion="random", input_size=CHAIN)
        assert pruned[0].out_channels % 8 == pruned[3].out_channels % 8 == 0
    narrow = dynnet.prune(chain(12), macs=0.5, criterion="random", input_size=CHAIN)
    assert narrow[0].out_channels in (4, 6, 8, 10)  # the multiple is halved until it fits
    pruned = dynnet.prune(model, macs=0.35, criterion="l1", floor=0.5, multiple=1, input_size=CHAIN)
    assert pruned[0].out_channels >= 32
    assert pruned[3].out_channels >= 64


def test_a_floor_holds_over_several_cuts() -> None:
    for steps in (1, 4):
        pruned = dynnet.prune(chain(64), macs=0.4, criterion="l1", floor=0.5, multiple=1, steps=steps, input_size=CHAIN)
        assert pruned[0].out_channels >= 32
        assert pruned[3].out_channels >= 64


def test_shares_may_be_of_another_model() -> None:
    model = chain(64)
    whole = trace(model, CHAIN, 1).macs
    settings = {"criterion": "l1", "multiple": 1, "floor": 0.4, "input_size": CHAIN}
    first = dynnet.prune(model, macs=0.5, **settings)
    again = dynnet.prune(first, macs=0.3, of=model, **settings)
    assert 0.28 < trace(again, CHAIN, 1).macs / whole <= 0.3
    assert min(again[0].out_channels / 64, again[3].out_channels / 128) >= 0.4
    same = dynnet.prune(first, macs=0.6, of=model, **settings)
    assert trace(same, CHAIN, 1).macs == trace(first, CHAIN, 1).macs  # there already
    for width in range(20, 60, 3):
        thin = chain(width)
        assert trace(dynnet.prune(thin, macs=1.0, of=model, **settings), CHAIN, 1).macs == trace(thin, CHAIN, 1).macs


def test_layers_that_work_once_for_a_whole_batch_cost_what_they_cost_alone() -> None:
    model = timm.create_model("test_vit_relpos", num_classes=CLASSES).eval()  # its bias table is computed once a call
    size = (3, 160, 160)
    pruned = dynnet.prune(model, macs=0.7, criterion="l1")
    assert 0.68 < trace(pruned, size, 1).macs / trace(model, size, 1).macs <= 0.7


def test_inference_mode_is_no_hindrance_where_no_gradients_are_needed() -> None:
    model = chain()
    expected = dynnet.prune(model, macs=0.5, criterion="l1", input_size=CHAIN)
    with torch.inference_mode():
        pruned = dynnet.prune(model, macs=0.5, criterion="l1", input_size=CHAIN)
        with pytest.raises(DataError, match="torch.inference_mode"):
            dynnet.prune(model, [(torch.randn(2, *CHAIN), torch.zeros(2).long())], macs=0.5, input_size=CHAIN)
    assert pruned[0].weight.shape == expected[0].weight.shape


def test_parameters_are_a_target_too() -> None:
    case = CASES[0]
    model = case.backbone()
    pruned = dynnet.prune(model, params=0.5, criterion="l2", multiple=1, input_size=case.size)
    share = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.45 < share <= 0.5


def test_a_target_can_be_reached_in_steps() -> None:
    model = chain(64).eval()
    seen: list[float] = []
    whole = trace(model, CHAIN, 1).macs

    def between(pruned: nn.Module) -> None:
        seen.append(trace(pruned, CHAIN, 1).macs / whole)
        pruned.train()

    pruned = dynnet.prune(model, macs=0.25, criterion="l2", multiple=1, steps=2, between=between, input_size=CHAIN)
    assert len(seen) == 1
    assert not any(module.training for module in pruned.modules())
    assert seen[0] == pytest.approx(0.5, abs=0.03)
    assert trace(pruned, CHAIN, 1).macs / whole == pytest.approx(0.25, abs=0.03)


def test_group_norms_lose_whole_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(), nn.Linear(512, 4)
    ).double()
    enliven(model)
    pruned = dynnet.prune(model, macs=0.5, criterion="l2", multiple=1, input_size=CHAIN)
    norm = pruned[1]
    assert norm.num_channels == pruned[0].out_channels == 4 * norm.num_groups < 32
    kept = [int((model[0].weight == row).flatten(1).all(1).nonzero()) for row in pruned[0].weight]
    assert kept == [4 * (k // 4) + i % 4 for i, k in enumerate(kept)]


def test_heads_of_attention_go_as_a_whole() -> None:
    case = next(case for case in CASES if case.name == "vit_tiny_patch16_224")
    model = case.backbone()
    groups = {g.members[0].layer: g for g in find_groups(model, case.size)}
    group = groups["blocks.1.attn.qkv"]
    assert (group.units, group.pinned) == (3, None)
    assert {(m.layer, m.channels.shape) for m in group.members} == {
        ("blocks.1.attn.qkv", (3, 48)),
        ("blocks.1.attn.proj", (3, 16)),
    }
    thin = copy.deepcopy(model)
    narrow_(thin, [group], [np.array([True, False, True])])
    assert (thin.blocks[1].attn.num_heads, thin.blocks[0].attn.num_heads) == (2, 3)
    assert thin.blocks[1].attn.qkv.out_features == 96
    costs = Costs(model, [group], case.size, "macs")
    gone = {(m.layer, m.role): m.width // 3 for m in group.members}
    assert costs.without(gone) == trace(thin, case.size, 1).macs
    # Where a forward takes the width of its input for that of its heads, they stay.
    with torch.device("meta"):
        other = timm.create_model("pvt_v2_b0")
    reasons = [g.pinned for g in find_groups(other, (3, 64, 64)) if g.members[0].layer == "stages.1.blocks.0.attn.q"]
    assert reasons == ["the forward of stages.1.blocks.0.attn needs their number"]


def test_timm_goes_on_with_a_pruned_model() -> None:
    case = Case("mobilenetv3_small_050")
    pruned = dynnet.prune(case.backbone(), macs=0.5, criterion="l2", input_size=case.size)
    images = case.images(2)
    features = pruned.forward_features(images)
    assert features.shape[1] == pruned.num_features
    assert pruned.forward_head(features, pre_logits=True).shape[1] == pruned.head_hidden_size
    outputs = pruned.forward_intermediates(images, intermediates_only=True)
    assert [entry["num_chs"] for entry in pruned.feature_info] == [x.shape[1] for x in outputs]
    pruned.reset_classifier(3)
    assert pruned(images).shape == (2, 3)
    model = dynnet.wrap(pruned, 2, gates="channel", input_size=case.size).eval()
    assert model.predict(images).logits.shape == (2, 3)


def test_a_dynamic_model_on_a_pruned_backbone_is_saved_with_its_shape(tmp_path: Path) -> None:
    case = CASES[0]
    pruned = dynnet.prune(case.backbone(), macs=0.5, criterion="l2", multiple=1, input_size=case.size)
    model = dynnet.wrap(pruned, 2, input_size=case.size)
    model.thresholds = [0.5, 0.5]
    dynnet.save(model, tmp_path / "x.safetensors")
    again = dynnet.load(tmp_path / "x.safetensors")
    images = case.images(4)
    assert torch.equal(again.predict(images).logits, model.predict(images).logits)
    assert torch.equal(again.predict(images).macs, model.predict(images).macs)
    dynnet.save(model.unwrap(), tmp_path / "y.safetensors")
    assert type(dynnet.load(tmp_path / "y.safetensors")) is type(pruned)
    narrow_one = timm.create_model("cifar_resnet20", num_classes=CLASSES, width=0.25)
    with pytest.raises(CheckpointError, match=r"into its shape: its 'bn1' makes and reads \[4, 4\] channels"):
        dynnet.load(tmp_path / "y.safetensors", narrow_one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got no target: give one of macs, params, latency"),
        ({"macs": 0.5, "params": 0.5}, "got macs=0.5, params=0.5: give one of"),
        ({"latency": 2.0}, r"latency=2.0: give a share of the model's in \(0, 1\]"),
        ({"macs": 0.0}, r"macs=0.0: give a share of the model's in \(0, 1\]"),
        ({"macs": 1.5}, r"in \(0, 1\]"),
        ({"macs": 0.01}, "macs=0.01 is out of reach for Sequential: .* still costs 0.0"),
        ({"macs": 0.5, "criterion": "taylr"}, "did you mean 'taylor'"),
        ({"macs": 0.5, "floor": 1.0}, "floor=1.0"),
        ({"macs": 0.5, "steps": 0}, "steps=0"),
        ({"macs": 0.5, "scope": "layer"}, "choose from global, group"),
        ({"macs": 0.5, "exclude": ["zero"]}, "exclude: Sequential has no module 'zero'"),
        ({"macs": 0.5, "exclude": ["0", "3"]}, "no channels to take away: .*excluded"),
        ({"macs": 0.5, "exclude": "0"}, r"exclude='0': give a list of module names, such as \['0'\]"),
        ({"macs": 0.5, "steps": 2, "loader": iter([])}, "an iterator, which is used up after the first"),
        ({"macs": 0.5, "steps": 2, "between": lambda m: sparsify_(m, 0.5)}, "has a mask on its weights"),
        ({"macs": 0.5, "input_size": (1, 8, 8)}, r"Sequential cannot run on images of size \(1, 8, 8\) .* input_size="),
    ],
)
def test_bad_input_leaves_the_model_untouched(settings: dict[str, Any], message: str) -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match=message):
        dynnet.prune(model, **{"criterion": "l1", "input_size": CHAIN, **settings})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_target_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def share(model: nn.Module, other: nn.Module, size: tuple[int, int, int]) -> float:
        """A machine on which half of the time does not depend on the channels."""
        asked.append(trace(model, size, 1).macs)
        return 0.5 + 0.5 * asked[-1] / trace(other, size, 1).macs

    monkeypatch.setattr(choosing, "time_share", share)
    model = chain()
    pruned = dynnet.prune(model, latency=0.7, criterion="l1", multiple=1, input_size=CHAIN)
    whole, left = (trace(m, CHAIN, 1).macs for m in (model, pruned))
    fits = [macs for macs in asked if macs <= 0.4 * whole]
    assert left == max(fits)  # the best of those tried
    assert left / whole > 0.3
    with pytest.raises(PruneError, match=r"latency=0.4 is out of reach for Sequential: .* takes 0.5\d\d of the time"):
        dynnet.prune(model, latency=0.4, criterion="l1", multiple=1, input_size=CHAIN)


def test_a_share_of_time_is_of_the_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = chain(), chain()
    images = []

    def timed(run: Any, batch: torch.Tensor) -> float:
        images.append(batch.shape)
        run(batch)
        return 2.0 if run is model else 8.0

    monkeypatch.setattr(importlib.import_module("dynnet.deploy.turns"), "_timed", timed)
    assert time_share(model, other, CHAIN) == 0.25
    assert set(images) == {(1, *CHAIN)}
