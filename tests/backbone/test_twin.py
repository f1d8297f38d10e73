"""A model's twin without numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynnet.backbone.dry_run import trace
from dynnet.backbone.twin import meta_twin
from dynnet.errors import ForwardError
from tests.cases import tiny


def test_a_twin_shares_what_the_model_shares_and_leaves_it_alone() -> None:
    model = tiny()
    model.tied = model[0][0]
    model.table = torch.ones(3)
    model[-1].extra = model[-1].weight
    twin = meta_twin(model)
    assert all(t.device.type == "meta" for t in [*twin.parameters(), *twin.buffers(), twin.table])
    assert all(t.device.type == "cpu" for t in [*model.parameters(), *model.buffers(), model.table])
    assert twin.tied is twin[0][0]
    assert twin[-1].extra is twin[-1].weight
    assert meta_twin(twin) is twin


def test_weights_that_a_hook_makes_can_be_copied() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(3, 2))
    model = nn.Sequential(nn.Flatten(), layer)
    model(torch.randn(2, 3, 1, 1))
    assert trace(model, (3, 1, 1), 2).output[0].shape == (2, 2)


def test_lazy_modules_are_told_to_run_first() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ForwardError, match="without a shape .* run it once on images first"):
        trace(model, (3, 4, 4), 2)


def test_a_forward_that_looks_at_numbers_is_told_so() -> None:
    class Checked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 255 if x.max() > 2 else x

    with pytest.raises(
        ForwardError, match="of Checked itself raised RuntimeError.*looks at numbers, and a dry run has"
    ):
        trace(Checked(), (3, 4, 4), 2)
