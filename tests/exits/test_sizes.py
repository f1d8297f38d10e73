"""Images of other sizes than a model was wrapped for, and such as are no squares."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dynnet.backbone.counting import flop_counter
from dynnet.exits import flow
from dynnet.exits.boundaries import Feature, grid_of
from dynnet.exits.flow import Flow, Tag
from dynnet.exits.heads import Conv, MapNeck
from tests.cases import CASES, Case, leave_one_by_one

BY_NAME = {case.name: case for case in CASES}
PYRAMID = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 48), "num_heads": (1, 2, 4, 8)}
VIT, SWIN = (BY_NAME[name].kwargs for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"))
SIZES = [
    (Case("pvt_v2_b0", kwargs=PYRAMID), (96, 64)),
    (Case("pvt_v2_b0", kwargs=PYRAMID), (128, 32)),  # as many tokens as 64 x 64
    (Case("pvt_v2_b0", (3, 96, 64), PYRAMID), (64, 64)),
    (Case("twins_svt_small", kwargs={"img_size": 64, **PYRAMID, "wss": (7, 7, 7, 7)}), (96, 64)),
    (Case("vit_tiny_patch16_224", kwargs={**VIT, "dynamic_img_size": True}), (96, 64)),
    (Case("swin_tiny_patch4_window7_224", (3, 56, 56), {**SWIN, "strict_img_size": False}), (112, 84)),
    (Case("swin_tiny_patch4_window7_224", (3, 56, 84), {**SWIN, "img_size": (56, 84)}), (56, 84)),
    (BY_NAME["resnet18"], (96, 40)),
    (BY_NAME["densenet121"], (65, 97)),
    (BY_NAME["test_convnext"], (96, 64)),
    (BY_NAME["poolformer_s12"], (64, 128)),
    (BY_NAME["caformer_s18"], (96, 64)),
    (BY_NAME["hrnet_w18_small"], (96, 64)),
]  # fmt: skip


@pytest.mark.parametrize(("case", "other"), SIZES, ids=lambda value: str(value))
@torch.no_grad()
def test_sizes_that_timm_runs_a_wrapped_model_runs(case: Case, other: tuple[int, int]) -> None:
    model = case.wrapped()
    images = torch.randn(5, 3, *other, generator=torch.Generator().manual_seed(1))
    taken = leave_one_by_one(model, images)
    together = model.predict(images)
    assert together.exit.tolist() == taken.tolist()
    assert set(taken.tolist()) == {0, 1, 2}
    for i in range(5):
        with flop_counter() as counter:
            alone = model(images[i : i + 1])
        torch.testing.assert_close(alone[0], together.logits[i], atol=1e-4, rtol=1e-4)
        assert counter.get_total_flops() == 2 * together.macs[i]


@pytest.mark.parametrize(
    ("tokens", "image", "grid"),
    [
        (16, (64, 64), (4, 4)),
        (16, (128, 32), (8, 2)),
        (24, (96, 64), (6, 4)),
        (24, (64, 96), (4, 6)),
        (96, (100, 64), (12, 8)),  # 8 pixels a side, the last row cut off
        (104, (100, 64), (13, 8)),  # or filled up
        (27, (298, 127), (9, 3)),
        (12, (64, 64), None),
        (17, (64, 64), None),
        (7, (64, 32), None),
    ],
)
def test_tokens_lie_as_the_image_does(tokens: int, image: tuple[int, int], grid: tuple[int, int] | None) -> None:
    assert grid_of(tokens, image) == grid


@torch.no_grad()
@pytest.mark.parametrize(
    ("image", "grid"),
    [((64, 64), (16, 16)), ((32, 128), (8, 32)), ((96, 64), (24, 16)), ((64, 64), (1, 30)), (None, (8, 8))],
)
def test_tokens_are_read_as_the_map_that_they_are(image: tuple[int, int] | None, grid: tuple[int, int]) -> None:
    convs = [Conv(8, 16, 3, 2), Conv(16, 16, 3, 2)]
    of_maps = MapNeck(Feature(0, (8, 16, 16), "nchw"), convs).eval()
    of_tokens = MapNeck(Feature(0, (257, 8), "tokens", 1), convs).eval()
    of_tokens.load_state_dict(of_maps.state_dict())
    maps = torch.randn(2, 8, *grid)
    tokens = torch.cat([torch.zeros(2, 1, 8), maps.flatten(2).mT], 1)
    with nullcontext() if image is None else flow.run(Flow(Tag(), (2, 3, *image))):
        torch.testing.assert_close(of_tokens(tokens), of_maps(maps))


def test_a_call_knows_its_images_and_nobody_else_does() -> None:
    assert flow.image_size() is None
    with flow.run(Flow(Tag(), (2, 3, 96, 64))):
        assert flow.image_size() == (96, 64)
    assert flow.image_size() is None
