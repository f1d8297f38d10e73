"""Can a backbone go on without the rows that left?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dynnet
from dynnet.backbone.row_order import Order, Orders
from dynnet.errors import ExitError, VerificationError
from tests.cases import leave_one_by_one

PIECES = 4


class Handed(nn.Module):
    """Hands pieces of the images, folded into the batch, past an exit to a block that reads them beside the state."""

    class Block(nn.Module):
        def __init__(self, inside: bool) -> None:
            super().__init__()
            self.inside, self.fc = inside, nn.Linear(8, 8)

        def forward(self, x: Tensor, pieces: Tensor) -> Tensor:
            folded = (PIECES, -1) if self.inside else (-1, PIECES)
            return x + self.fc(pieces).unflatten(0, folded).mean(0 if self.inside else 1)

    def __init__(self, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.stem, self.first = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.block, self.head = self.Block(inside), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2)[:, :, :PIECES].transpose(1, 2)  # (B, pieces, 8)
        pieces = (tokens.transpose(0, 1) if self.inside else tokens).flatten(0, 1)
        return self.head(self.block(self.first(tokens.mean(1)), pieces))


def test_pieces_of_a_sample_side_by_side_lose_its_rows() -> None:
    model = dynnet.wrap(Handed(inside=False).eval(), ["first"], input_size=(3, 16, 16))
    images = torch.randn(6, 3, 16, 16)
    leave_one_by_one(model, images)
    dynnet.verify(model, images)


def test_samples_folded_inside_are_refused() -> None:
    backbone = Handed(inside=True).eval()
    with pytest.raises(ExitError, match="what 'block' receives beside them .* samples are folded inside"):
        dynnet.wrap(backbone, ["first"], input_size=(3, 16, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_verifying_finds_what_a_dry_run_has_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orders, "of", lambda self, x: None if self.dim(x) is None else Order(self.dim(x), 1))
    model = dynnet.wrap(Handed(inside=True).eval(), ["first"], input_size=(3, 16, 16))
    with pytest.raises(VerificationError, match=r"a sample alone equals it in company +BROKEN"):
        dynnet.verify(model, torch.randn(6, 3, 16, 16))
