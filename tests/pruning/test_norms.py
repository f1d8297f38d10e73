"""Batch norms after a cut, and what is not pruned as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynnet
from dynnet.backbone.hooks import reading
from dynnet.errors import DataError, NonFiniteError, PruneError
from dynnet.pruning import prune_layers, recalibrate_, sparsify_, sparsify_n_m_
from dynnet.pruning.norms import shrink_scales_
from tests.cases import CASES, CHAIN, Case, chain, enliven


def test_wrapped_and_masked_models_are_refused() -> None:
    case = CASES[0]
    with pytest.raises(PruneError, match="unwrap"):
        dynnet.prune(case.wrapped(), macs=0.5)
    for refuse in (
        lambda: dynnet.prune(case.wrapped().backbone, macs=0.5),
        lambda: sparsify_(case.wrapped(), 0.5),
        lambda: sparsify_n_m_(case.wrapped()),
        lambda: prune_layers(case.wrapped(), lambda model: 0.0, 0.5),
    ):
        with pytest.raises(PruneError, match="unwrap"):
            refuse()
    model = chain()
    sparsify_(model, 0.5)
    with pytest.raises(PruneError, match="0 has a mask on its weights; call dynnet.pruning.make_permanent"):
        dynnet.prune(model, macs=0.5, criterion="l1", input_size=CHAIN)


def test_batch_norms_are_measured_anew() -> None:
    model = chain().double()
    pruned = dynnet.prune(model, macs=0.5, criterion="l2", multiple=1, input_size=CHAIN).train()
    images = torch.randn(64, *CHAIN, dtype=torch.float64)
    recalibrate_(pruned, images.split(16))
    expected = pruned[0](images)
    assert torch.allclose(pruned[1].running_mean, expected.mean((0, 2, 3)))
    assert torch.allclose(pruned[1].running_var, expected.var((0, 2, 3)))
    assert pruned.training
    assert pruned[1].momentum == 0.1
    before = pruned[1].running_mean.clone()
    with pytest.raises(DataError, match="no batches"):
        recalibrate_(pruned, [])
    with pytest.raises(NonFiniteError, match="1 was given NaN"):
        recalibrate_(pruned, [images, images * torch.nan])
    with pytest.raises(RuntimeError):  # three channels are expected
        recalibrate_(pruned, [images, images[:, :2]])
    assert torch.equal(pruned[1].running_mean, before)
    recalibrate_(pruned, [(images[:63], ["no labels here"]), images[63:]])
    assert torch.allclose(pruned[1].running_mean, before)  # one image alone counts as any other
    recalibrate_(pruned, images.split(16), batches=1)
    assert torch.allclose(pruned[1].running_mean, expected[:16].mean((0, 2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 16])
def test_batch_norms_measure_the_images_and_not_how_they_are_batched(size: int) -> None:
    scale = torch.linspace(0.2, 3, 16).view(-1, 1, 1, 1)
    images = scale * torch.randn(16, 3, 32, 32) + scale - 1.5
    model = CASES[0].backbone()
    enliven(model)
    recalibrate_(model, images.split(size))
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    given: dict[str, torch.Tensor] = {}
    with reading(norms, given.__setitem__):
        model(images)
    for name, norm in norms.items():  # in use each sees what it has measured
        torch.testing.assert_close(norm.running_mean, given[name].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, given[name].var((0, 2, 3)), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_single_pixels_and_single_images_can_be_measured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4)).eval()
    images = torch.randn(6, 3, 8, 8)
    recalibrate_(model, images.split(1))
    given = model[0](images)[:, :, 0, 0]
    torch.testing.assert_close(model[1].running_var, given.var(0))
    torch.testing.assert_close(model[3].running_mean, torch.zeros(4), rtol=0, atol=1e-5)
    recalibrate_(model, [images[:1]])
    assert model(images[:1]).isfinite().all()


@torch.no_grad()
def test_a_norm_that_runs_twice_is_measured_over_both_calls_and_one_that_does_not_run_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.unused.running_mean.fill_(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(2 * self.norm(x) + 1)

    model, images = Twice().eval(), torch.randn(8, 3, 4, 4) + 5
    recalibrate_(model, images.split(1))
    once = nn.BatchNorm2d(3).eval()
    recalibrate_(once, [images])
    both = torch.cat([images, 2 * once(images) + 1])
    torch.testing.assert_close(model.norm.running_mean, both.mean((0, 2, 3)))
    torch.testing.assert_close(model.norm.running_var, both.var((0, 2, 3)))
    assert (model.unused.running_mean == 7).all()


@torch.no_grad()
def test_batch_norms_of_a_wrapped_model_see_every_sample_and_channel() -> None:
    case = Case("cifar_resnet20", (3, 32, 32))
    images = [case.images(8)]
    plain, leaving = case.backbone(), case.wrapped()
    leaving.thresholds = [float("-inf")] * len(leaving.exits)  # all would leave at the first exit
    for model in (plain, leaving):
        recalibrate_(model, images)
    assert all(torch.equal(v, leaving.backbone.state_dict()[k]) for k, v in plain.state_dict().items())
    gated = case.wrapped([], gates="channel")
    assert gated.gates is not None
    gated.gates.freeze([torch.arange(region.units) % 2 == 0 for region in gated.gates.plan.regions])
    recalibrate_(gated, images)
    norms = [norm for norm in gated.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 1 for norm in norms)


def test_scales_shrink_to_zero_and_stop_there() -> None:
    norm = torch.nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor([0.5, -0.5, 0.05, 0.0])
    shrink_scales_(torch.nn.Sequential(norm), 0.1)
    assert torch.allclose(norm.weight, torch.tensor([0.4, -0.4, 0.0, 0.0]))
