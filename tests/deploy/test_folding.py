"""Batch norm folding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import dynnet
from dynnet.errors import DynnetError
from tests.cases import CASES, CHAIN, CHANNELWISE, Case, chain, channelwise, leave_one_by_one, tiny


def scramble(model: nn.Module) -> None:
    """Statistics and scales as after training: a fresh batch norm does nothing."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_folded_model_answers_the_same(case: Case) -> None:
    model = case.wrapped()
    scramble(model)
    leave_one_by_one(model, case.images())
    before, count = model.predict(case.images()), norms(model)
    folded = dynnet.fold(model)
    assert norms(model) == count
    after = folded.predict(case.images())
    torch.testing.assert_close(after.logits, before.logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(after.exit, before.exit)
    assert torch.equal(after.macs, before.macs)


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "mobilenetv3_small_050", "regnetx_002"])
def test_nothing_foldable_is_left(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    folded = dynnet.fold(case.wrapped())
    left = [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    # A norm on which an exit listens stays.
    assert all(n.removeprefix("backbone.") in folded.exits for n in left)


def test_plain_modules_and_layouts() -> None:
    model = tiny().to(memory_format=torch.channels_last)
    scramble(model)
    folded = dynnet.fold(model, (3, 32, 32))
    assert norms(folded) == 0
    assert folded[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-4)


def test_a_convolution_with_a_second_reader_is_left_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.fc((x + self.norm(x)).mean((2, 3)))

    assert norms(dynnet.fold(Both(), (3, 8, 8))) == 1


@pytest.mark.parametrize("kind", CHANNELWISE)
@torch.no_grad()
def test_every_kind_of_batch_norm_is_folded_and_no_other(kind: str) -> None:
    model = channelwise(kind)
    folded = dynnet.fold(model, CHAIN)
    left = type(model[1]) in [type(module) for module in folded]
    assert left == (kind == "slopes" or "instance" in kind)
    x = torch.randn(3, *CHAIN)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("norm", "remedy"),
    [
        (nn.utils.weight_norm, r"torch.nn.utils.remove_weight_norm"),
        (nn.utils.spectral_norm, r"torch.nn.utils.remove_spectral_norm"),
        (partial(nn.utils.prune.random_unstructured, name="weight", amount=0.5), r"torch.nn.utils.prune.remove$"),
        (nn.utils.parametrizations.weight_norm, r"torch.nn.utils.parametrize.remove_parametrizations"),
        (nn.utils.parametrizations.spectral_norm, r"torch.nn.utils.parametrize.remove_parametrizations"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_made_anew_at_every_call_stay_right(
    norm: Callable[[nn.Module], nn.Module], remedy: str
) -> None:
    model = chain()
    scramble(model)
    norm(model[0])
    images = torch.randn(2, *CHAIN)
    expected = model(images)  # with gradients, which make what a hook leaves on the layer
    folded = dynnet.fold(model, CHAIN)
    torch.testing.assert_close(folded(images), expected)
    assert norms(folded) == 1
    with pytest.raises(DynnetError, match=remedy):
        dynnet.prune(model, macs=0.5)


@torch.no_grad()
def test_a_layer_that_somebody_listens_to_or_stands_in_for_is_left_alone() -> None:
    images = torch.randn(2, *CHAIN)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * nn.functional.conv2d(x, model[0].weight, model[0].bias)

    for change in (
        lambda conv: conv.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda conv: conv.register_forward_hook(lambda module, args, output: 2 * output),
        lambda conv: setattr(conv, "forward", doubled),
    ):
        model = chain()
        scramble(model)
        change(model[0])
        expected = model(images)
        torch.testing.assert_close(dynnet.fold(model, CHAIN)(images), expected)
