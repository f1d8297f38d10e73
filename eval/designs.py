"""Exit heads that were tried beside `dynnet.exits.heads.ExitHead`, for the study in `eval.heads`.

A head of the study answers, and hands something on to the head after it: its logits, its tokens, or nothing.

    B batch, C channels, K classes, H x W pixels, T tokens of D numbers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynnet

_TOKENS, _WIDTH, _VIEWS, _POOLED = 16, 128, 4, 8  # T, D, heads of the attention, and pixels a side that it reads


class Host(NamedTuple):
    """What heads are made for.

    Attributes:
        backbone: is left alone.
        exits: E names.
        channels: of the maps (C, H, W) that they give.
        input_size: of the images.
        num_classes: K.
    """

    backbone: nn.Module
    exits: Sequence[str]
    channels: Sequence[int]
    input_size: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class Design:
    """Heads for all exits of a backbone, and how they are trained.

    Attributes:
        name: its row in the table.
        make: one head for each exit.
        lr: at the peak of its schedule.
        distill: the part of a head's loss that comes from the final exit.
        weighted: does a sample count by the chance that it reaches the head?
    """

    name: str
    make: Callable[[Host], list[nn.Module]]
    lr: float = 0.1
    distill: float = 0.3
    weighted: bool = False


class Alone(nn.Module):
    """An `ExitHead` as it is."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, output: Any, before: Tensor | None = None) -> tuple[Tensor, None]:
        return self.head(output), None


class AfterTheLast(nn.Module):
    """It reads the previous exit's answer too, normalised and detached, beside its own features (as in ZTW,
    https://arxiv.org/abs/2106.05409)."""

    def __init__(self, head: nn.Module, classes: int) -> None:
        super().__init__()
        self.head = head
        self.before = nn.Linear(classes, classes, bias=False)

    def forward(self, output: Any, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.head(output)
        if before is not None:
            # A linear layer on both side by side is the sum of one on each.
            logits = logits + self.before(F.log_softmax(before.detach(), 1))
        return logits, logits


class WithContext(nn.Module):
    """A depthwise convolution with a large kernel goes before the head: context, where receptive field is lacking."""

    def __init__(self, head: nn.Module, channels: int, kernel: int) -> None:
        super().__init__()
        self.head = head
        self.context = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, 1, kernel // 2, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, output: Tensor, before: Tensor | None = None) -> tuple[Tensor, None]:
        return self.head(self.context(output)), None


class Latents(nn.Module):
    """Tokens that read a pooled map by cross-attention, answer, and go on to the next exit (as in Dyn-Perceiver,
    https://arxiv.org/abs/2306.11248, but one way: the backbone never hears of them)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(_TOKENS, _WIDTH) * 0.02)
        self.norm_map, self.norm_ask = nn.LayerNorm(channels), nn.LayerNorm(_WIDTH)
        self.norm_mix, self.norm_say = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.ask, self.read = nn.Linear(_WIDTH, _WIDTH), nn.Linear(channels, 2 * _WIDTH)
        self.join = nn.Linear(_WIDTH, _WIDTH)
        self.mix = nn.Sequential(nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))
        self.classifier = nn.Linear(_WIDTH, classes)

    def forward(self, output: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """output (B, C, H, W), before (B, T, D)."""
        tokens = self.start.expand(len(output), -1, -1) if before is None else before
        pooled = F.adaptive_avg_pool2d(output, _POOLED).flatten(2).transpose(1, 2)
        keys, values = self.read(self.norm_map(pooled)).chunk(2, -1)
        parts = [x.unflatten(2, (_VIEWS, -1)).transpose(1, 2) for x in (self.ask(self.norm_ask(tokens)), keys, values)]
        seen = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        tokens = tokens + self.join(seen)
        tokens = tokens + self.mix(self.norm_mix(tokens))
        return self.classifier(self.norm_say(tokens).mean(1)), tokens


def _fitted(host: Host, share: float, blocks: bool = True) -> list[nn.Module]:
    """The heads that `dynnet.wrap` makes."""
    backbone = deepcopy(host.backbone)
    model = dynnet.wrap(backbone, host.exits, head_share=share, head_blocks=blocks, input_size=host.input_size)
    return list(model.heads)


def _alone(share: float, blocks: bool = True) -> Callable[[Host], list[nn.Module]]:
    return lambda host: [Alone(head) for head in _fitted(host, share, blocks)]


def _after_the_last(host: Host) -> list[nn.Module]:
    return [AfterTheLast(head, host.num_classes) for head in _fitted(host, LARGE)]


def _with_context(host: Host) -> list[nn.Module]:
    return [WithContext(head, c, 7) for head, c in zip(_fitted(host, LARGE), host.channels, strict=True)]


def _latents(host: Host) -> list[nn.Module]:
    return [Latents(channels, host.num_classes) for channels in host.channels]


def chain(heads: nn.ModuleList, outputs: Sequence[Tensor]) -> list[Tensor]:
    """What heads of the study say, (B, K) each, of what their exits give."""
    said, before = [], None
    for head, output in zip(heads, outputs, strict=True):
        logits, before = head(output, before)
        said.append(logits)
    return said


SMALL, LARGE = 0.02, 0.06  # of the backbone's MACs
DESIGNS = (
    Design("2% a head", _alone(SMALL, False)),
    Design("6% a head, no blocks", _alone(LARGE, False)),
    Design("6% a head", _alone(LARGE)),
    Design("6%, no distillation", _alone(LARGE), distill=0.0),
    Design("6%, nearly all distillation", _alone(LARGE), distill=0.9),
    Design("6%, weighted by who comes", _alone(LARGE), weighted=True),
    Design("6%, reading the answer before", _after_the_last),
    Design("6%, a depthwise 7x7 before it", _with_context),
    Design("latent tokens", _latents, lr=0.03),
)
