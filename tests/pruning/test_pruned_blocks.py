"""Residual blocks that a network can do without."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import dynnet
from dynnet.backbone.dry_run import trace
from dynnet.errors import NonFiniteError, PruneError
from dynnet.pruning import prune_layers, removable_blocks, remove_blocks, sensitivity

SIZE = (3, 32, 32)
BLOCKS = ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]

MOBILE = [f"blocks.{i}" for i in ("1.1", "2.1", "2.2", "3.0", "3.1", "4.1", "4.2")]
CONVNEXT = [f"stages.{i}.blocks.{j}" for i, depth in enumerate((1, 2, 4, 2)) for j in range(depth)]


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", num_classes=5).eval()


def likeness(reference: nn.Module) -> object:
    images = torch.randn(8, *SIZE)
    expected = reference(images).detach()
    return lambda model: -float((model(images).detach() - expected).abs().mean())


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [
        ("cifar_resnet20", SIZE, BLOCKS),
        ("vgg11_bn", SIZE, []),
        (
            "mobilenetv3_small_050",
            (3, 64, 64),
            MOBILE,
        ),
        (
            "test_convnext",
            (3, 64, 64),
            CONVNEXT,
        ),
        ("vit_tiny_patch16_224", (3, 224, 224), [f"blocks.{i}" for i in range(12)]),
    ],
)
def test_residual_blocks_are_found(name: str, size: tuple[int, int, int], blocks: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert removable_blocks(model, size) == blocks


def test_without_a_block_its_input_goes_on() -> None:
    model = backbone()
    shorter = remove_blocks(model, ["layer2.1"])
    images = torch.randn(2, *SIZE)
    x = model.layer2[0](model.layer1(model.act1(model.bn1(model.conv1(images)))))
    expected = model.forward_head(model.layer3(model.layer2[2](x)))
    assert torch.equal(shorter(images), expected)
    assert len(list(model.layer2[1].parameters())) > 0
    with pytest.raises(PruneError, match="did you mean 'layer2"):
        remove_blocks(model, ["layer2.11"])
    with pytest.raises(PruneError, match="blocks='layer2.1': give a list"):
        remove_blocks(model, "layer2.1")
    with pytest.raises(PruneError, match=r"cannot run on images of size \(1, 32, 32\)"):
        removable_blocks(model, (1, 32, 32))


def test_the_block_that_does_least_is_needed_least() -> None:
    model = backbone()
    with torch.no_grad():
        model.layer3[1].bn2.weight.mul_(1e-3)
        model.layer1[2].bn2.weight.mul_(10)
    found = sensitivity(model, likeness(model), input_size=SIZE)
    assert {s.block for s in found} == set(BLOCKS)
    assert found[0].block == "layer3.1"
    assert found[-1].drop > 10 * found[0].drop >= 0
    total = trace(model, SIZE, 1)
    assert found[0].macs_share == pytest.approx(
        sum(m for n, m in total.layers.items() if n.startswith("layer3.1.")) / total.macs
    )
    few = sensitivity(model, likeness(model), ["layer1.0"], SIZE)
    assert [s.block for s in few] == ["layer1.0"]
    with pytest.raises(PruneError, match="'layer2.0' is no residual block"):
        sensitivity(model, likeness(model), ["layer2.0"], SIZE)


def test_blocks_go_until_the_target_is_reached(tmp_path: Path) -> None:
    model = backbone()
    with torch.no_grad():
        model.layer3[1].bn2.weight.zero_()
    shorter = prune_layers(model, likeness(model), 0.7, SIZE)
    share = trace(shorter, SIZE, 1).macs / trace(model, SIZE, 1).macs
    assert 0.5 < share <= 0.7
    assert not list(shorter.layer3[1].parameters())
    with pytest.raises(PruneError, match=r"out of reach for cifar_resnet20: without any of its blocks it is 0\.\d+"):
        prune_layers(model, likeness(model), 0.1, SIZE)
    with pytest.raises(PruneError, match=r"in \(0, 1\]"):
        prune_layers(model, likeness(model), 0.0, SIZE)
    with pytest.raises(NonFiniteError, match="the metric of the model is nan"):
        prune_layers(model, lambda _: float("nan"), 0.7, SIZE)

    dynnet.save(shorter, tmp_path / "x.safetensors", {"model_name": "cifar_resnet20", "num_classes": 5})
    again = dynnet.load(tmp_path / "x.safetensors")
    images = torch.randn(2, *SIZE)
    assert torch.equal(again(images), shorter(images))
