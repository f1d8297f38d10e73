"""Forwards that note the batch size before an exit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dynnet
from tests.cases import leave_one_by_one


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


class Noting(nn.Module):
    """Reshapes with the size that the batch had before its exits, and reshapes tables of its own to 8 rows and to 4."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.fc = nn.Conv2d(3, width, 8, 8), nn.Linear(width, 5)
        self.a, self.b, self.c = Stage(width), Stage(width), Stage(width)
        self.table = nn.Parameter(torch.randn(1, 64, width))
        self.scales = nn.Parameter(torch.randn(1, 12))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[0]
        x = self.c(self.b(self.a(self.patches(x).flatten(2).transpose(1, 2))))
        grid = self.table.view(8, 8, -1)  # nothing to do with the batch
        scale = self.scales.reshape(4, -1).amax(1).mean()
        return self.fc((x.reshape(size, 8, 8, -1) + grid.sin()).mean((1, 2)) * scale)


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 4, 5, 8, 9])
def test_only_what_is_the_batchs_is_corrected(size: int) -> None:
    model = dynnet.wrap(Noting().eval(), ["a", "b"], input_size=(3, 64, 64))
    images = torch.randn(size, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    taken = leave_one_by_one(model, images)
    together = model.predict(images)
    assert together.exit.tolist() == taken.tolist()
    alone = torch.cat([model.predict(images[i : i + 1]).logits for i in range(size)])
    torch.testing.assert_close(alone, together.logits)


def test_a_copy_corrects_as_well() -> None:
    model = copy.deepcopy(dynnet.wrap(Noting().eval(), ["a"], input_size=(3, 64, 64)))
    images = torch.randn(8, 3, 64, 64)
    leave_one_by_one(model, images)
    assert len(model.predict(images).exit.unique()) == 2


class OtherWays(nn.Module):
    """Takes another line for larger images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.fc = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.a, self.b = Stage(16), Stage(16)

    def forward(self, x: Tensor) -> Tensor:
        size, _, height, _ = x.shape
        x = self.b(self.a(self.patches(x).flatten(2).transpose(1, 2)))
        x = x.reshape(size, 12, 12, -1)[:, :8, :8] if height > 64 else x.reshape(size, 8, 8, -1)
        return self.fc(x.mean((1, 2)))


@torch.no_grad()
def test_lines_that_run_on_other_sizes_of_images_are_found_when_these_come() -> None:
    model = dynnet.wrap(OtherWays().eval(), ["a"], input_size=(3, 64, 64))
    for side in (64, 96):
        images = torch.randn(6, 3, side, side)
        taken = leave_one_by_one(model, images)
        assert model.predict(images).exit.tolist() == taken.tolist()
