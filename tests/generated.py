"""Small networks of randomly chosen parts, for truths that must hold on any network."""

from __future__ import annotations

import torch
from timm.layers import RmsNorm2d
from torch import Tensor, nn


class Generated(nn.Module):
    """A small network of randomly chosen parts; widths are multiples of 8."""

    def __init__(self, parts: list[str], width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.parts = nn.ModuleList(PARTS[name](width) for name in parts)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = part(x)
        return self.fc(x.mean((2, 3)))


def unit(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Weighed(nn.Module):
    """Channel attention by one layer, which reads and makes the same channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.fc = unit(width, 2 * width), nn.Conv2d(2 * width, 2 * width, 1)
        self.back = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.back(x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid())


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Joined(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Scaled(nn.Module):
    """Channel attention over its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class GatedMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.up(self.norm(x.permute(0, 2, 3, 1))).chunk(2, -1)
        return x + self.down(y * nn.functional.gelu(gate)).permute(0, 3, 1, 2)


class Sequenced(nn.Module):
    """Pixels in a row, mixed by convolutions along it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(width, 2 * width, 3, padding=1), nn.Conv1d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.flatten(2)).relu()).view_as(x)


PARTS = {
    "plain": lambda w: unit(w, w),
    "basic": lambda w: Residual(nn.Sequential(unit(w, w), unit(w, w))),
    "grouped": lambda w: Residual(nn.Sequential(unit(w, 2 * w, 1), unit(2 * w, 2 * w, groups=4), unit(2 * w, w, 1))),
    "inverted": lambda w: Residual(
        nn.Sequential(unit(w, 4 * w, 1), unit(4 * w, 4 * w, 5, groups=4 * w), Scaled(4 * w), unit(4 * w, w, 1))
    ),
    "branches": lambda w: nn.Sequential(Joined(unit(w, w), nn.Sequential(unit(w, w, 1), unit(w, w))), unit(2 * w, w)),
    "mlp": GatedMlp,
    "normed": lambda w: Residual(
        nn.Sequential(nn.Conv2d(w, 2 * w, 1), nn.GroupNorm(4, 2 * w), nn.ReLU(), nn.Conv2d(2 * w, w, 1))
    ),
    "weighed": Weighed,
    "rms": lambda w: Residual(
        nn.Sequential(nn.Conv2d(w, 2 * w, 1), RmsNorm2d(2 * w), nn.GELU(), nn.Conv2d(2 * w, w, 1))
    ),
    "transposed": lambda w: Residual(
        nn.Sequential(nn.ConvTranspose2d(w, 2 * w, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(2 * w, w, 1))
    ),
    "sequence": Sequenced,
}
