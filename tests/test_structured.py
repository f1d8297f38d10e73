"""Channels taken away for good."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.grn import GlobalResponseNorm
from timm.models.metaformer import StarReLU
from torch import Tensor, nn

import dynnet
from dynnet.channels import Group, find_groups
from dynnet.layers import channel_dim
from dynnet.probe import trace
from dynnet.pruning.structured import narrow
from dynnet.slicing import cut, subset
from tests.cases import CASES, CLASSES, Case, enliven

LOOKS_AT_ALL = (
    nn.LayerNorm,
    nn.GroupNorm,
    GlobalResponseNorm,
    StdConv2d,
    StdConv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
)


class OfWhatIsLeft(nn.Module):
    """A layer that looks at all of its inputs at once, here at those that are not zeroed; the others stay zero."""

    def __init__(self, layer: nn.Module, kept: np.ndarray, width: int, passes: bool) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        cut(self.layer, subset(torch.from_numpy(kept), width), None)
        self.kept, self.passes = torch.from_numpy(kept), passes

    def forward(self, x: Tensor) -> Tensor:
        dim = channel_dim(self.layer, x)
        narrow_output = self.layer(x.index_select(dim, self.kept))
        return torch.zeros_like(x).index_copy(dim, self.kept, narrow_output) if self.passes else narrow_output


def zero(model: nn.Module, groups: Sequence[Group], stay: Sequence[np.ndarray]) -> None:
    """Make channels zero, in place, by the weights, biases and norms that make them."""
    kept: dict[tuple[str, str], np.ndarray] = {}
    for group, mask in zip(groups, stay, strict=True):
        for member in group.members:
            side = kept.setdefault((member.layer, member.role), np.ones(member.width, dtype=bool))
            side[member.channels[~mask].ravel()] = False
    for (name, role), mask in kept.items():
        if role in ("produces", "passes"):
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.data[torch.from_numpy(~mask)] = 0
    for (name, role), mask in kept.items():
        layer = model.get_submodule(name)
        grouped = getattr(layer, "groups", 1) > 1  # groups that are left are as they were
        if role in ("reads", "mixes") and not mask.all() and isinstance(layer, LOOKS_AT_ALL) and not grouped:
            parent, _, key = name.rpartition(".")
            left = OfWhatIsLeft(layer, np.flatnonzero(mask), len(mask), role == "mixes")
            setattr(model.get_submodule(parent), key, left)


def assert_cut_is_zeroed(model: nn.Module, size: tuple[int, ...], seed: int = 0) -> int:
    """For every group by itself and for all at once; returns how many groups there are."""
    groups = [g for g in find_groups(model, size) if g.pinned is None and g.units > 1 and g.layers("produces")]
    images = torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    numbers = np.random.default_rng(seed)
    picks = [[group] for group in groups] + [groups]
    for pick in picks:
        stay = []
        for group in pick:
            mask = numbers.random(group.units) < 0.5
            if any(isinstance(model.get_submodule(m.layer), nn.GroupNorm) for m in group.members):
                mask[:] = numbers.random(1) < 0.5  # whole norm groups are checked by pruning
            mask[numbers.integers(group.units)] = True
            stay.append(mask)
        if any(
            isinstance(model.get_submodule(m.layer), nn.GroupNorm) and not mask.all()
            for group, mask in zip(pick, stay, strict=True)
            for m in group.members
        ):
            continue
        zeroed, thin = copy.deepcopy(model), copy.deepcopy(model)
        zero(zeroed, pick, stay)
        narrow(thin, pick, stay)
        with torch.no_grad():
            expected, got = zeroed(images), thin(images)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), pick[0].members
    return len(groups)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cut_is_zeroed(case: Case) -> None:
    model = case.backbone().double()
    enliven(model)
    for module in model.modules():
        if isinstance(module, StarReLU):
            module.bias.data.zero_()  # else what it makes of zero is not zero
    assert assert_cut_is_zeroed(model, case.size) > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_models_cost_what_was_asked_for_and_learn(case: Case, tmp_path: Path) -> None:
    model = case.backbone()
    whole = trace(model, case.size, 1).macs
    pruned = dynnet.prune(model, macs=0.6, criterion="l2", multiple=4, input_size=case.size)
    assert 0.5 < trace(pruned, case.size, 1).macs / whole <= 0.6
    assert trace(model, case.size, 1).macs == whole
    images = case.images(3)
    pruned.train()(images).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())

    dynnet.save(pruned, tmp_path / "thin.safetensors", {"model_name": case.name, "num_classes": CLASSES, **case.kwargs})
    again = dynnet.load_backbone(tmp_path / "thin.safetensors")
    with torch.no_grad():
        assert torch.equal(again(images), pruned.eval()(images))
    assert {k: v for k, v in vars(again).items() if type(v) in (int, list)} == {
        k: v for k, v in vars(pruned).items() if type(v) in (int, list)
    }
