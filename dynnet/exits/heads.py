"""Exit heads made to fit a boundary: from any nesting of features to (B, K) logits.

Maps with more pixels than the backbone's last ones are brought down by strided 3x3 convolutions first (as in MSDNet,
https://arxiv.org/abs/1703.09844): pooling them at once would lose what a classifier needs. What they leave of a budget
makes residual blocks of them, from the last on: a head early in a network does the work of all stages that it cuts off.
Average and maximum are pooled side by side (as in Shallow-Deep Networks, https://arxiv.org/abs/1810.07052).

Maps of many channels get a lean head: averaged over 2x2 pixels, a 1x1 convolution (the shortcut of ResNet-D,
https://arxiv.org/abs/1812.01187), averaged. One image at a time, starting an operator costs more than its MACs.

Where thousands of classes make the classifier itself too dear, it is factored through fewer features (as the embeddings
of ALBERT, https://arxiv.org/abs/1909.11942, are).

    B batch, C channels, K classes, N tokens, H x W pixels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynnet.exits.boundaries import Boundary, Feature, grid_of
from dynnet.exits.flow import features, image_size

HeadFactory = Callable[[Boundary, int], nn.Module | None]

_NARROWEST = 16  # channels of a head's convolutions, and features of a factored classifier, at least
_MANY = 128  # more channels than these get a lean head
_LEAN = 96  # channels of a lean head's convolution, at most
_HIDDEN = 512  # units of a token head's hidden layer, at most


def heads_by_name(there: Mapping[str, nn.Module]) -> HeadFactory:
    """Gives heads that are there already, by the names of their boundaries."""

    def build(boundary: Boundary, num_classes: int) -> nn.Module:
        return there[boundary.name]

    return build


class ExitHead(nn.Module):
    """Reads every feature of a boundary, joins what it found, and answers.

    Args:
        boundary: where it stands.
        num_classes: K.
        grid: pixels a side of the backbone's last maps; larger maps are brought down to it.
        budget: MACs that the head may cost, and up to twice that where a step narrower would be too little or too
            much; its widths follow from it. What cannot be had for that is made as narrow as can be.
        blocks: may it have residual blocks?
    """

    def __init__(self, boundary: Boundary, num_classes: int, grid: int, budget: float, blocks: bool = True) -> None:
        super().__init__()
        self.leaves = [feature.leaf for feature in boundary.features]
        necks, width, _ = _shape(boundary.features, num_classes, grid, budget, blocks)
        found = sum(neck.out_features for neck in necks)
        self.necks = nn.ModuleList(necks)
        self.factor = None if width is None else nn.Linear(found, width, bias=False)
        self.classifier = nn.Linear(found if width is None else width, num_classes)

    def forward(self, output: Any) -> Tensor:
        """The boundary's output to (B, K) logits."""
        tensors = features(output)
        found = [neck(tensors[leaf]) for leaf, neck in zip(self.leaves, self.necks, strict=True)]
        x = found[0] if len(found) == 1 else torch.cat(found, 1)
        return self.classifier(x if self.factor is None else self.factor(x))


class Conv(NamedTuple):
    """One convolution of a neck; batch norm and ReLU follow. Where the stride is wider than the kernel, an average over
    what would be skipped goes before. `block` makes a residual block of it, with a second convolution."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    block: bool = False


class Residual(nn.Module):
    """A block of a neck: two 3x3 convolutions, and a 1x1 convolution around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride), rounded up."""
        return (self.inside(x) + self.around(x)).relu()


class MapNeck(nn.Module):
    """A feature map, in any layout, to a vector.

    Args:
        feature: of layout "nchw", "nhwc", or "tokens" that lie in rows.
        convs: from the feature's channels on; none for pooling alone.

    Tokens are laid out by the size of the images that are running, where their number fits it, else in a single row.
    """

    def __init__(self, feature: Feature, convs: Sequence[Conv]) -> None:
        super().__init__()
        self.feature = feature
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride, block in convs:
            if block:
                layers.append(Residual(inputs, outputs, stride))
                continue
            if stride > kernel:
                layers.append(nn.AvgPool2d(stride, ceil_mode=True))
                stride = 1
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.convs = nn.Sequential(*layers)
        self.lean = feature.channels > _MANY
        self.out_features = (1 if self.lean else 2) * (convs[-1].outputs if convs else feature.channels)
        self.macs = _conv_macs(feature, convs)
        # Raw features of a pre-norm backbone have any scale; the convolutions' batch norm has taken care of it already.
        self.norm = nn.Identity() if convs else nn.LayerNorm(self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.feature.layout == "nhwc":
            x = x.permute(0, 3, 1, 2)
        elif self.feature.layout == "tokens":
            x = x[:, self.feature.prefix :]
            grid = grid_of(x.shape[1], image_size() or self.feature.image) or (1, x.shape[1])
            x = x.transpose(1, 2).unflatten(2, grid)
        x = self.convs(x)
        mean = x.mean((2, 3))
        return self.norm(mean if self.lean else torch.cat([mean, x.amax((2, 3))], 1))


class TokenNeck(nn.Module):
    """Tokens to a vector: the class token, if any, beside the mean of the patches, through one hidden layer."""

    def __init__(self, feature: Feature) -> None:
        super().__init__()
        self.prefix = feature.prefix
        inputs = feature.channels * (2 if self.prefix else 1)
        self.out_features = min(feature.channels, _HIDDEN)
        self.macs = inputs * self.out_features
        self.norm = nn.LayerNorm(feature.channels)
        self.hidden = nn.Sequential(nn.Linear(inputs, self.out_features), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pooled = x[:, self.prefix :].mean(1)
        return self.hidden(torch.cat([x[:, 0], pooled], 1) if self.prefix else pooled)


class VectorNeck(nn.Module):
    """A vector, normalised."""

    def __init__(self, feature: Feature) -> None:
        super().__init__()
        self.out_features = feature.channels
        self.macs = 0
        self.norm = nn.LayerNorm(feature.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


Neck = MapNeck | TokenNeck | VectorNeck


class _Shape(NamedTuple):
    """Necks, through how many features the classifier is factored (None where it is whole), and the price of all."""

    necks: list[Neck]
    width: int | None
    macs: float


def _shape(features: Sequence[Feature], classes: int, grid: int, budget: float, blocks: bool) -> _Shape:
    """The first shape that keeps within twice the budget, else the cheapest."""
    dear: list[_Shape] = []
    for shape in _shapes(
        features, classes, grid, budget, blocks
    ):  # one by one: what is not built draws no random numbers
        if shape.macs <= 2 * budget:
            return shape
        dear.append(shape)
    return min(dear, key=lambda shape: shape.macs)


def _shapes(features: Sequence[Feature], classes: int, grid: int, budget: float, blocks: bool) -> Iterator[_Shape]:
    """Necks that have the whole budget, half of it, or nothing but pooling; the classifier as wide as they leave it."""
    for share in (budget, budget / 2, 0):
        necks = [_neck(feature, grid, share / len(features), blocks) for feature in features]
        spent, found = sum(neck.macs for neck in necks), sum(neck.out_features for neck in necks)
        yield _Shape(necks, None, spent + found * classes)
        if share < budget:
            width = max(_NARROWEST, int((budget - spent) / (found + classes)) // 8 * 8)
            yield _Shape(necks, width, spent + width * (found + classes))


def _neck(feature: Feature, grid: int, budget: float, blocks: bool) -> Neck:
    if feature.layout == "vector":
        return VectorNeck(feature)
    convs = _convs(feature, grid, budget)
    if blocks:
        convs = _with_blocks(feature, convs, budget)
    if feature.layout == "tokens" and not convs:
        return TokenNeck(feature)
    return MapNeck(feature, convs)


def _convs(feature: Feature, grid: int, budget: float) -> list[Conv]:
    """The widest convolutions that the budget allows.

    The narrowest may cost twice the budget; where not even that is enough, pooling has to do.
    """
    side = min(feature.grid)
    steps = 0
    while side > grid:
        side, steps = (side + 1) // 2, steps + 1
    best: list[Conv] = []
    widest = _LEAN if feature.channels > _MANY else 4 * max(feature.channels, _NARROWEST)
    for last in range(_NARROWEST, widest + 1, 8):
        convs = _plan(feature.channels, last, steps)
        if _conv_macs(feature, convs) > (budget if best else 2 * budget):
            break
        best = convs
    return best


def _with_blocks(feature: Feature, convs: list[Conv], budget: float) -> list[Conv]:
    """As many residual blocks as the budget has room for, from the last convolution on."""
    for at in reversed(range(len(convs))):
        more = [conv._replace(block=conv.block or number == at) for number, conv in enumerate(convs)]
        if convs[at].kernel != 3 or _conv_macs(feature, more) > budget:
            break
        convs = more
    return convs


def _plan(channels: int, last: int, steps: int) -> list[Conv]:
    """Two strided 3x3 convolutions at most, channels doubling up to `last` as the pixels are quartered, or the one
    convolution of a lean head; what pixels remain are pooled."""
    if channels > _MANY:
        return [Conv(channels, last, 1, 2)] if steps else []
    steps = min(steps, 2)
    convs = []
    for i in range(steps):
        outputs = max(_NARROWEST, last >> (steps - 1 - i))
        convs.append(Conv(channels, outputs, 3, 2))
        channels = outputs
    return convs


def _conv_macs(feature: Feature, convs: Sequence[Conv]) -> int:
    height, width = feature.grid
    macs = 0
    for inputs, outputs, kernel, stride, block in convs:
        height, width = -(-height // stride), -(-width // stride)
        weights = kernel**2 * inputs * outputs + (kernel**2 * outputs**2 + inputs * outputs if block else 0)
        macs += weights * height * width
    return macs
