"""Every verb leaves each module of the user's model in its mode, train or eval, and gives copies in the modes that it
says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dynnet
from dynnet.backbone.dry_run import trace
from dynnet.channels.finding import find_groups
from dynnet.pruning import (
    make_permanent_,
    prune_layers,
    recalibrate_,
    removable_blocks,
    remove_blocks,
    sensitivity,
    sparsify_,
    sparsify_n_m_,
)
from tests.cases import CASES

CASE = CASES[0]
BATCHES = [(CASE.images(4), torch.arange(4))]


def prune(model: nn.Module, criterion: str) -> nn.Module:
    return dynnet.prune(model, BATCHES, macs=0.7, criterion=criterion, batches=1, input_size=CASE.size)


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "trace": lambda m: trace(m, CASE.size, 1),
    "find_groups": lambda m: find_groups(m, CASE.size),
    "prune by weights": lambda m: prune(m, "l1"),
    "prune by slopes": lambda m: prune(m, "taylor"),
    "prune in steps": lambda m: dynnet.prune(
        m, macs=0.7, criterion="l1", steps=2, between=lambda thin: thin.train(), input_size=CASE.size
    ),
    "prune_layers": lambda m: prune_layers(m, lambda shorter: 0.0, 0.9, CASE.size),
    "removable_blocks": lambda m: removable_blocks(m, CASE.size),
    "remove_blocks": lambda m: remove_blocks(m, ["layer1.1"]),
    "sensitivity": lambda m: sensitivity(m, lambda shorter: 0.0, ["layer1.1"], CASE.size),
    "sparsify_": lambda m: sparsify_(m, 0.5),
    "sparsify_ by slopes": lambda m: sparsify_(m, 0.5, BATCHES, criterion="taylor"),
    "sparsify_n_m_": lambda m: sparsify_n_m_(m),
    "recalibrate_": lambda m: recalibrate_(m, BATCHES),
    "fold": lambda m: dynnet.fold(m, CASE.size),
}
IN_EVAL_MODE = {"fold"}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_verb_leaves_every_module_in_its_mode(verb: str, training: bool) -> None:
    model = CASE.backbone().train(training)
    for module in [model.layer2, *(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))]:
        module.training = not training  # norms frozen by hand, and one stage
    before = modes(model)
    copied = VERBS[verb](model)
    after = modes(model)
    assert {name: after[name] for name in before} == before
    for name in after.keys() - before.keys():  # a mask is in the mode of its layer
        assert after[name] == after[name.partition(".parametrizations")[0]]
    if isinstance(copied, nn.Module):
        expected = dict.fromkeys(before, False) if verb in IN_EVAL_MODE else before
        assert all(mode == expected[name] for name, mode in modes(copied).items() if name in expected)


def test_masks_go_and_come_in_the_mode_of_their_layer() -> None:
    model = CASE.backbone()
    before = modes(model)
    sparsify_(model, 0.5)
    make_permanent_(model)
    assert modes(model) == before
