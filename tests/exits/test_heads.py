"""Heads made to fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynnet.backbone.dry_run import trace
from dynnet.exits.boundaries import Boundary, Feature
from dynnet.exits.heads import ExitHead, TokenNeck, VectorNeck


def head(*features: Feature, budget: float = 1e6, grid: int = 4) -> ExitHead:
    return ExitHead(Boundary("b", tuple((i, 1) for i in range(len(features))), features, 0.5), 5, grid, budget).eval()


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("nchw", (8, 16, 16)), ("nhwc", (16, 16, 8)), ("tokens", (256, 8)), ("tokens", (10, 8)), ("vector", (8,))],
)
def test_every_layout_gets_an_answer(layout, shape) -> None:
    assert head(Feature(0, shape, layout))(torch.randn(3, *shape)).shape == (3, 5)


def test_the_same_picture_in_any_layout_answers_the_same() -> None:
    maps = torch.randn(3, 8, 16, 16)
    nchw = head(Feature(0, (8, 16, 16), "nchw"))
    for feature, output in (
        (Feature(0, (16, 16, 8), "nhwc"), maps.permute(0, 2, 3, 1)),
        (Feature(0, (258, 8), "tokens", prefix=2), torch.cat([torch.zeros(3, 2, 8), maps.flatten(2).mT], 1)),
    ):
        other = head(feature)
        other.load_state_dict(nchw.state_dict())
        torch.testing.assert_close(other(output), nchw(maps))


def test_large_maps_get_convolutions_and_small_ones_do_not() -> None:
    def convs(side: int) -> int:
        return sum(isinstance(m, nn.Conv2d) for m in head(Feature(0, (8, side, side), "nchw")).modules())

    assert [convs(side) for side in (4, 8, 16, 32)] == [0, 1, 2, 2]


def test_width_follows_the_budget() -> None:
    feature = Feature(0, (64, 28, 28), "nchw")
    macs = [trace(head(feature, budget=b, grid=7), (64, 28, 28), 1).macs for b in (2.5e6, 5e6, 1e7)]
    assert macs == sorted(macs)
    assert trace(head(feature, budget=1e5, grid=7), (64, 28, 28), 1).macs == 2 * 64 * 5  # pooling alone
    for spent, budget in zip(macs, (2.5e6, 5e6, 1e7), strict=True):
        assert 0.5 * budget < spent <= budget


def test_tuples_are_read_whole() -> None:
    both = head(Feature(0, (8, 8, 8), "nchw"), Feature(2, (10, 6), "tokens", prefix=1))
    output = (torch.randn(2, 8, 8, 8), torch.arange(3), {"tokens": torch.randn(2, 10, 6)})
    logits = both(output)
    assert logits.shape == (2, 5)
    changed = (output[0], output[1], {"tokens": output[2]["tokens"] + 1})
    changed[2]["tokens"][:, 0] *= -1
    assert not torch.equal(both(changed), logits)


def test_class_token_and_patches_both_count() -> None:
    neck = TokenNeck(Feature(0, (5, 6), "tokens", prefix=1))
    x = torch.randn(2, 5, 6)
    for row in (0, 3):
        y = x.clone()
        y[:, row] += torch.randn(6)
        assert not torch.allclose(neck(x), neck(y))
    assert VectorNeck(Feature(0, (6,), "vector"))(x[:, 0]).shape == (2, 6)
