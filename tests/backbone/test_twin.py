"""A model's twin without numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynnet.backbone.dry_run import trace
from dynnet.backbone.twin import copy_of, meta_twin
from dynnet.errors import ForwardError, UnsupportedError
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


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_forward_has_left_on_a_model_is_copied_with_it(norm: Callable[[nn.Module], nn.Module]) -> None:
    class Storing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()
            norm(self.net[1][0])
            self.features: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.features.append(self.net[0](x))
            self.last = {"features": self.net(x)}
            return self.last["features"]

    model, x = Storing().eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)  # with gradients
    twin, copied = meta_twin(model), copy_of(model)
    assert twin.features[0].device.type == twin.last["features"].device.type == "meta"
    assert torch.equal(copied(x), expected)
    assert copied.features[0] is not model.features[0]
    assert len(model.features) == 1


def test_a_model_that_cannot_be_copied_is_told_so() -> None:
    model = tiny()
    model.lock = threading.Lock()
    for copying in (meta_twin, copy_of):
        with pytest.raises(UnsupportedError, match="Sequential cannot be copied .*lock.*; take away"):
            copying(model)
