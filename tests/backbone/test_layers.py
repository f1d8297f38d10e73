"""Layers on a subset of their channels."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    GroupNorm1,
    GroupNormAct,
    LayerNorm,
    LayerNorm2d,
    LayerNormAct2d,
    RmsNorm,
    RmsNorm2d,
    ScaledStdConv2d,
    StdConv2dSame,
)
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import RmsNormAct2d
from torch import Tensor, nn

from dynnet.backbone.layers.table import by_output, channel_dim, cut_, effect_of, run, stated_widths
from dynnet.backbone.subsets import subset
from dynnet.errors import GateError
from tests.cases import CHANNELWISE


def inputs(layer: nn.Module) -> Tensor:
    """Images, sequences or tokens of 12 channels, as the layer takes them."""
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 5, 12)
    return torch.randn(2, 12, 9) if isinstance(layer, nn.Conv1d) else torch.randn(2, 12, 9, 9)


def some(width: int, *, groups: int = 1, seed: int = 0) -> Tensor:
    """Ascending channels, whole groups of them, about half."""
    units = torch.randperm(groups if groups > 1 else width, generator=torch.Generator().manual_seed(seed))
    per_unit = width // len(units)
    chosen = units[: max(1, len(units) // 2)].sort().values
    return (chosen[:, None] * per_unit + torch.arange(per_unit)).flatten()


def alive(layer: nn.Module) -> nn.Module:
    """With parameters and statistics that are not what they begin as."""
    with torch.no_grad():
        for tensor in [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return layer.eval()


WEIGHING = {
    "conv": nn.Conv2d(12, 16, 3, 2, 1),
    "pointwise": nn.Conv2d(12, 16, 1, bias=False),
    "channels_last": nn.Conv2d(12, 16, 3).to(memory_format=torch.channels_last),
    "reflecting": nn.Conv2d(12, 16, 3, padding=1, padding_mode="reflect"),
    "same": Conv2dSame(12, 16, 3, 2),
    "standardised": StdConv2dSame(12, 16, 3, stride=2),
    "scaled": ScaledStdConv2d(12, 16, 3, padding=1),
    "linear": nn.Linear(12, 16),
    "sequence": nn.Conv1d(12, 16, 3, padding=1),
    "transposed": nn.ConvTranspose2d(12, 16, 3, 2, 1, 1),
}


@pytest.mark.parametrize("name", WEIGHING)
def test_a_layer_on_some_channels_equals_the_whole_layer_on_zeros(name: str) -> None:
    layer = alive(WEIGHING[name])
    x = inputs(layer)
    dim = channel_dim(layer, x)
    for read, made in ((some(12), some(16, seed=1)), (None, some(16)), (some(12), None), (None, None)):
        narrow = x if read is None else x.index_select(dim, read)
        zeroed = x if read is None else torch.zeros_like(x).index_copy(dim, read, narrow)
        expected = layer(zeroed) if made is None else layer(zeroed).index_select(dim, made)
        reads, makes = (None if c is None else subset(c, w) for c, w in ((read, 12), (made, 16)))
        torch.testing.assert_close(run(layer, narrow, reads, makes), expected)


PASSING = {
    "depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "batch norm without parameters": nn.BatchNorm2d(16, affine=False),
    "batch norm and activation": BatchNormAct2d(16),
    **{kind: build(16) for kind, build in CHANNELWISE.items()},
}
MIXING = {
    "layer norm": nn.LayerNorm(16),
    "timm's layer norm": LayerNorm(16),
    "layer norm of maps": LayerNorm2d(16),
    "bare layer norm": nn.LayerNorm(16, elementwise_affine=False),
    "layer norm and activation": LayerNormAct2d(16),
    "group norm": nn.GroupNorm(4, 16),
    "bare group norm": nn.GroupNorm(2, 16, affine=False),
    "one group": GroupNorm1(16),
    "group norm and activation": GroupNormAct(16, num_groups=4),
    "root mean square norm": nn.RMSNorm(16),
    "timm's root mean square norm": RmsNorm(16),
    "root mean square norm of maps": RmsNorm2d(16),
    "root mean square norm and activation": RmsNormAct2d(16),
    "bare root mean square norm": nn.RMSNorm(16, eps=1e-5, elementwise_affine=False),
    "response norm": GlobalResponseNorm(16),
    "response norm of maps": GlobalResponseNorm(16, channels_last=False),
}


@pytest.mark.parametrize("name", [*PASSING, *MIXING])
def test_norms_and_depthwise_layers_pass_on_what_they_read(name: str) -> None:
    layer = alive((PASSING | MIXING)[name])
    assert effect_of(layer) == ("passes" if name in PASSING else "mixes")
    x = torch.randn(2, 16, 16, 16) * 3 + 1
    dim = channel_dim(layer, x)
    read = some(16)
    narrow = x.index_select(dim, read)
    zeroed = torch.zeros_like(x).index_copy(dim, read, narrow)
    torch.testing.assert_close(run(layer, narrow, subset(read, 16), None), layer(zeroed).index_select(dim, read))


@pytest.mark.parametrize("name", ["layer norm", "group norm", "response norm", "root mean square norm"])
def test_norms_in_half_precision_do_not_overflow(name: str) -> None:
    layer, read = alive(copy.deepcopy(MIXING[name])), some(16)
    x = 100 * torch.randn(2, 16, 16, 16)
    narrow = x.index_select(channel_dim(layer, x), read)
    expected = run(layer, narrow, subset(read, 16), None)
    found = run(layer.half(), narrow.half(), subset(read, 16), None)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * float(expected.detach().abs().max()))


def test_grouped_convolutions_lose_whole_groups() -> None:
    layer = alive(nn.Conv2d(12, 24, 3, groups=4))
    x = torch.randn(2, 12, 9, 9)
    read, made = some(12, groups=4), some(24, groups=4)
    expected = layer(x)[:, made]
    torch.testing.assert_close(run(layer, x[:, read], subset(read, 12), subset(made, 24)), expected)


def cut_copy(layer: nn.Module, reads: Tensor | None, read_of: int, makes: Tensor | None, made_of: int) -> nn.Module:
    narrow = copy.deepcopy(layer)
    cut_(narrow, *(None if c is None else subset(c, w) for c, w in ((reads, read_of), (makes, made_of))))
    return narrow


@pytest.mark.parametrize("name", WEIGHING)
def test_a_layer_cut_for_good_computes_what_it_does_when_narrowed_for_one_input(name: str) -> None:
    layer = alive(WEIGHING[name])
    x = inputs(layer)
    dim = channel_dim(layer, x)
    for read, made in ((some(12), some(16, seed=1)), (None, some(16)), (some(12), None), (None, None)):
        if read is not None and name in ("standardised", "scaled"):
            continue  # standardised over the inputs that are left
        narrow = x if read is None else x.index_select(dim, read)
        reads, makes = (None if c is None else subset(c, w) for c, w in ((read, 12), (made, 16)))
        after = cut_copy(layer, read, 12, made, 16)
        torch.testing.assert_close(after(narrow), run(layer, narrow, reads, makes))
        assert stated_widths(after) == (16 if made is None else len(made), narrow.shape[dim])


def test_cut_norms_and_depthwise_layers_have_the_width_that_is_left() -> None:
    for layer in map(alive, (PASSING | MIXING).values()):
        read = torch.tensor([0, 2, 5, 7, 8, 11, 12, 13])  # two of every four
        x = torch.randn(2, 16, 16, 16)
        dim = channel_dim(layer, x)
        after = cut_copy(layer, read, 16, None, 16)
        narrow = x.index_select(dim, read)
        if effect_of(layer) == "passes":
            torch.testing.assert_close(after(narrow), layer(x).index_select(dim, read))
        assert after(narrow).shape == narrow.shape
        assert all(len(tensor) == 8 for tensor in [*after.parameters(), *after.buffers()] if tensor.ndim)


def test_a_group_norm_is_cut_to_equal_groups_only() -> None:
    layer, x = alive(nn.GroupNorm(4, 16)), torch.randn(2, 16, 5, 5)
    whole = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15])
    after = cut_copy(layer, whole, 16, None, 16)
    assert (after.num_groups, after.num_channels) == (2, 8)
    torch.testing.assert_close(after(x[:, whole]), layer(x)[:, whole])
    with pytest.raises(GateError, match=r"groups of \[2, 1\] channels; keep equally many of each"):
        cut_(layer, subset(torch.tensor([0, 1, 4]), 16), None)
    assert layer.num_channels == len(layer.weight) == 16


def test_a_grouped_convolution_is_cut_by_whole_groups() -> None:
    layer = alive(nn.Conv2d(12, 24, 3, groups=4))
    read, made = some(12, groups=4), some(24, groups=4)
    after = cut_copy(layer, read, 12, made, 24)
    x = torch.randn(2, 12, 9, 9)
    torch.testing.assert_close(after(x[:, read]), layer(x)[:, made])
    assert (after.in_channels, after.out_channels, after.groups) == (6, 12, 2)


def test_grouped_transposed_convolutions_lose_whole_groups() -> None:
    layer = alive(nn.ConvTranspose2d(12, 24, 3, 2, groups=4))
    read, made = some(12, groups=4), some(24, groups=4)
    x = torch.randn(2, 12, 5, 5)
    torch.testing.assert_close(run(layer, x[:, read], subset(read, 12), subset(made, 24)), layer(x)[:, made])
    after = cut_copy(layer, read, 12, made, 24)
    torch.testing.assert_close(after(x[:, read]), layer(x)[:, made])
    assert (after.in_channels, after.out_channels, after.groups) == (6, 12, 2)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_transposed_weight_can_be_turned_and_turned_back(groups: int) -> None:
    layer = nn.ConvTranspose2d(12, 24, 3, groups=groups)
    turned = by_output(layer, layer.weight)
    assert turned.shape == (24, 12 // groups, 3, 3)
    assert torch.equal(by_output(layer, turned), layer.weight)


def test_a_cut_layer_trains_what_was_trained() -> None:
    layer = nn.Conv2d(12, 16, 3)
    layer.bias.requires_grad_(False)
    after = cut_copy(layer, some(12), 12, some(16), 16)
    assert after.weight.requires_grad
    assert after.weight.is_leaf
    assert not after.bias.requires_grad


def test_narrow_weights_keep_the_layout() -> None:
    layer = nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last)
    chosen = subset(some(16), 16)
    for dim in (0, 1):
        taken = chosen.take(layer.weight.data, dim)
        assert taken.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(taken, layer.weight.data.index_select(dim, chosen.channels()))


@pytest.mark.parametrize(
    ("channels", "size"),
    [([0, 1, 2, 3], 4), ([4, 5, 6, 7, 12, 13, 14, 15], 4), ([1, 2], 1), ([2, 3, 6, 7], 2), ([5], 1), ([0, 1, 2], 1)],
)
def test_channels_are_found_in_the_largest_blocks(channels: list[int], size: int) -> None:
    found = subset(torch.tensor(channels), 16)
    assert found.size == size
    assert found.channels().tolist() == channels
    assert len(found) == len(channels)
