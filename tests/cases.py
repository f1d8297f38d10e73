"""Small backbones of many families, for the invariants that must hold on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import dynnet
from dynnet import DynamicModel
from dynnet.exits.confidence import Score, max_probability

CLASSES = 7


@dataclass(frozen=True)
class Case:
    """One backbone, small enough to run many times.

    Attributes:
        name: timm's.
        size: of the images.
        kwargs: further arguments of the model.
    """

    name: str
    size: tuple[int, int, int] = (3, 64, 64)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def backbone(self) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(self.name, num_classes=CLASSES, **self.kwargs).eval()

    def wrapped(self, exits: Any = (1 / 3, 2 / 3), **kwargs: Any) -> DynamicModel:
        return dynnet.wrap(self.backbone(), list(exits), input_size=self.size, **kwargs)

    def images(self, count: int = 5) -> Tensor:
        return torch.randn(count, *self.size, generator=torch.Generator().manual_seed(1))

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("cifar_resnet20", (3, 32, 32)),
    Case("resnet18"),
    Case("test_resnet"),
    Case("resnetv2_18"),
    Case("test_byobnet"),
    Case("test_nfnet"),
    Case("test_efficientnet"),
    Case("mobilenetv3_small_050"),
    Case("mobilenetv4_conv_small_035"),
    Case("regnetx_002"),
    Case("densenet121", kwargs={"block_config": (2, 2, 2, 2), "growth_rate": 8}),
    Case("test_convnext"),
    Case("test_mambaout", (3, 160, 160)),
    Case("test_vit", (3, 160, 160)),
    Case("vit_tiny_patch16_224", kwargs={"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}),
    Case("deit_tiny_distilled_patch16_224", kwargs={"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}),
    Case(
        "swin_tiny_patch4_window7_224",
        (3, 56, 56),
        {"img_size": 56, "embed_dim": 24, "depths": (1, 1, 2), "num_heads": (1, 2, 3), "window_size": 7},
    ),
    Case("mixer_s32_224", (3, 224, 224)),
    Case("poolformer_s12"),
    # Tuples and lists of tensors, two-input cells, and forwards that note the batch size before an exit.
    Case("crossvit_9_240", (3, 240, 240), {"embed_dim": (32, 64)}),
    Case("efficientvim_m1", (3, 224, 224)),
    Case("selecsls42b"),
    Case("hrnet_w18_small"),
    Case("caformer_s18"),
    Case("coat_lite_tiny", kwargs={"img_size": 64}),
]

FEW = [case for case in CASES if case.name in {"cifar_resnet20", "test_vit", "test_convnext", "crossvit_9_240"}]


def leave_one_by_one(model: DynamicModel, images: Tensor, measure: Score = max_probability) -> Tensor:
    """Set thresholds so that images leave at every exit; returns the exits that they then take, (B,).

    Each threshold lies half-way between two confidences, where rounding decides nothing.
    """
    with torch.no_grad():
        logits = model.forward_exits(images).logits
    running = torch.arange(len(images))
    taken = torch.full((len(images),), len(model.exits))
    thresholds = []
    for i in range(len(model.exits)):
        confidence = measure(logits[i])[running].double()
        order = confidence.argsort(descending=True)
        leaving = max(1, len(running) // 3)
        thresholds.append(float(confidence[order[leaving - 1 : leaving + 1]].mean()))
        taken[running[order[:leaving]]] = i
        running = running[order[leaving:]].sort().values
    model.thresholds = thresholds
    return taken


def tiny(classes: int = 4, channels: int = 3) -> nn.Module:
    """A plain torch network without anything of timm's."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, classes),
    ).eval()


CHAIN = (3, 12, 12)


def chain(units: int = 16) -> nn.Module:
    """Two convolutions in a row, for images of size `CHAIN`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, units, 3), nn.BatchNorm2d(units), nn.ReLU(), nn.Conv2d(units, 2 * units, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * units, 4),
    ).eval()  # fmt: skip


CHANNELWISE: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm2d,
    "synchronised": nn.SyncBatchNorm,
    "synchronised, with activation": lambda width: convert_sync_batchnorm(BatchNormAct2d(width)),
    "frozen": FrozenBatchNorm2d,
    "frozen, with activation": FrozenBatchNormAct2d,
    "instance norm": partial(nn.InstanceNorm2d, affine=True),
    "bare instance norm": nn.InstanceNorm2d,
    "instance norm with statistics": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "slopes": nn.PReLU,
}


def channelwise(kind: str) -> nn.Module:
    """Convolutions with a layer of one of `CHANNELWISE` behind each, for images of size `CHAIN`."""
    torch.manual_seed(0)
    layer = CHANNELWISE[kind]
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), layer(32), nn.ReLU(), nn.Conv2d(32, 48, 3), layer(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4),
    ).eval()  # fmt: skip
    enliven(model)
    return model


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give norms, scales and biases numbers of their own, so that every channel and every branch counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim <= 1 or tensor.numel() == max(tensor.shape):
                if "bias" in name or "mean" in name:
                    tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
                elif tensor.is_floating_point():
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


def open_at_random(model: DynamicModel, seed: int = 0, bias: float = 0.0) -> None:
    """Gate networks whose decisions differ from image to image; about half is open where the bias is zero."""
    assert model.gates is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in model.gates.networks:
            for layer, scale in ((network.hidden, 0.5), (network.logits, 2.0)):
                layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator))
            network.logits.bias.copy_(bias + 0.5 * torch.randn(network.logits.bias.shape, generator=generator))
