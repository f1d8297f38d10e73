"""Batch norms after a cut, and what is not pruned as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynnet
from dynnet.errors import DataError, NonFiniteError, PruneError
from dynnet.pruning import prune_layers, recalibrate_, sparsify_, sparsify_n_m_
from tests.cases import CASES, CHAIN, Case, chain


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
    means = torch.stack([part.var((0, 2, 3)) for part in expected.split(16)]).mean(0)
    assert torch.allclose(pruned[1].running_var, means)
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
    recalibrate_(pruned, [(images, ["no labels here"]), images[:1]])
    assert torch.allclose(pruned[1].running_mean, expected.mean((0, 2, 3)))  # one image alone does not count


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
