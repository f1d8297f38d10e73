"""What it means to take channels away: the same as if they were zero wherever they are read."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from timm.layers import RmsNorm, RmsNorm2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from dynnet.backbone.layers.table import by_output, channel_dim, cut_, weighing_kind
from dynnet.backbone.subsets import subset
from dynnet.channels.finding import find_groups
from dynnet.channels.groups import Group
from dynnet.pruning.narrowing import bound_units, narrow_

LOOKS_AT_ALL = (
    nn.LayerNorm,
    nn.RMSNorm,
    RmsNorm,
    RmsNorm2d,
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
        cut_(self.layer, subset(torch.from_numpy(kept), width), None)
        self.kept, self.passes = torch.from_numpy(kept), passes

    def forward(self, x: Tensor) -> Tensor:
        dim = channel_dim(self.layer, x)
        narrow_output = self.layer(x.index_select(dim, self.kept))
        return torch.zeros_like(x).index_copy(dim, self.kept, narrow_output) if self.passes else narrow_output


def zero(model: nn.Module, groups: Sequence[Group], stay: Sequence[np.ndarray]) -> None:
    """Make channels zero, in place, by the weights, biases and norms that make them, and by those that read them: what
    stands in between may make something of zero (a softmax over pixels, say)."""
    kept: dict[tuple[str, str], np.ndarray] = {}
    for group, mask in zip(groups, stay, strict=True):
        for member in group.members:
            side = kept.setdefault((member.layer, member.role), np.ones(member.width, dtype=bool))
            side[member.channels[~mask].ravel()] = False
    for (name, role), mask in kept.items():
        layer, gone = model.get_submodule(name), torch.from_numpy(~mask)
        if weighing_kind(layer):
            weight = by_output(layer, layer.weight.data).clone()
            if role in ("produces", "passes"):
                weight[gone] = 0
                if layer.bias is not None:
                    layer.bias.data[gone] = 0
            elif role == "reads" and getattr(layer, "groups", 1) == 1:
                weight[:, gone] = 0
            layer.weight.data = by_output(layer, weight).contiguous()
            if role in ("produces", "passes") and getattr(layer, "gain", None) is not None:
                layer.gain.data[gone] = 0
        elif role == "passes":
            for key in ("weight", "bias"):  # buffers, where a norm is frozen
                if getattr(layer, key, None) is not None:
                    getattr(layer, key).data[gone] = 0
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
    images = torch.randn(1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    numbers = np.random.default_rng(seed)
    picks = [[group] for group in groups] + [groups]
    for pick in picks:
        stay = []
        for group in pick:
            bound = bound_units(model, group)
            mask = (numbers.random(group.units) < 0.5)[bound]
            mask[bound == numbers.choice(bound)] = True
            stay.append(mask)
        zeroed, thin = copy.deepcopy(model), copy.deepcopy(model)
        zero(zeroed, pick, stay)
        narrow_(thin, pick, stay)
        with torch.no_grad():
            expected, got = zeroed(images), thin(images)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), pick[0].members
    return len(groups)
