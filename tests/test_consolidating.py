"""Gates on channels, made into a few nested widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dynnet
from dynnet import GateConfig
from dynnet.channels.finding import find_groups
from dynnet.consolidating import _shares
from dynnet.errors import GateError
from dynnet.exits.boundaries import Boundary
from dynnet.gates.routers import Routers
from dynnet.pruning.ordering import reorder_
from tests.cases import CASES, FEW, Case, enliven, open_at_random
from training import train

SORTED = [
    case for case in CASES if case.name in {"cifar_resnet20", "test_efficientnet", "regnetx_002", "test_convnext"}
]


def loader(case: Case, batches: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(case.images(8) + 0.1 * n, torch.zeros(8, dtype=torch.long)) for n in range(batches)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in SORTED else pytest.mark.sweep) for case in CASES], ids=str
)
def test_units_in_another_order_make_the_same_network(case: Case) -> None:
    backbone, images = case.backbone(), case.images(2)
    enliven(backbone)
    before = backbone(images)
    groups = [g for g in find_groups(backbone, case.size) if g.pinned is None and not g.numbers and g.units > 1]
    if case.name != "test_mambaout":
        assert groups
    generator = np.random.default_rng(0)
    reorder_(backbone, groups, [generator.permutation(group.units) for group in groups])
    after = backbone(images)
    assert (after - before).abs().max() < 1e-4 * before.abs().max() + 1e-6


def test_heads_of_ones_own_go_along_and_are_on_the_bill() -> None:
    case = FEW[0]

    def own(boundary: Boundary, classes: int) -> nn.Module:
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        channels = boundary.features[0].channels
        return nn.Sequential(nn.Conv2d(channels, 48, 3, padding=1), pooled, nn.Linear(48, classes))

    gated = dynnet.wrap(
        case.backbone(), ["layer1", "layer2"], gates=GateConfig(unit=2), input_size=case.size, heads=own,
        confidence="patience",
    ).eval()  # fmt: skip
    gated.thresholds = [1 / 3, 2 / 3]
    assert dynnet.consolidate(gated, iter(loader(case)), [0.5, 1.0]).ledger().heads == gated.ledger().heads
    model = dynnet.consolidate(gated, loader(case), [0.5, 1.0], exits=["layer1"])
    assert model.ledger().heads == gated.ledger().heads[:1]
    # One classifier in agreement is one of two now, and leaves as before.
    assert model.thresholds == (0.5,)
    assert model.predict(case.images(3)).exit.tolist() == gated.predict(case.images(3)).exit.tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", SORTED, ids=str)
def test_what_is_open_most_often_comes_first_and_nothing_else_changes(case: Case) -> None:
    backbone = case.backbone()
    enliven(backbone)
    gated = dynnet.wrap(backbone, [1 / 3, 2 / 3], gates=GateConfig(unit=1), input_size=case.size)
    open_at_random(gated)
    gated.thresholds = [0.9, 0.8]
    images = case.images(4)
    before = gated.run_every_exit(images).logits[-1]
    model = dynnet.consolidate(gated, loader(case), [0.25, 0.5, 1.0], unit=2)
    assert isinstance(model.gates, Routers)
    assert model.thresholds == (0.9, 0.8)
    assert model.exits == gated.exits
    after = model.run_every_exit(images).logits
    assert (after[-1] - before).abs().max() < 1e-4 * before.abs().max()
    assert torch.allclose(after[0], gated.run_every_exit(images).logits[0], atol=1e-4)
    assert gated.run_every_exit(images).logits[-1].equal(before)  # left as it was
    # Of what is always open and what never is, the narrowest width holds the former.
    bills = []
    for width in range(3):
        model.gates.choose([width] * len(model.gates.plan.regions))
        bills.append(int(model.predict(images[:1]).macs))
    assert bills == sorted(set(bills))


def test_the_narrowest_width_holds_what_gates_leave_open() -> None:
    case = FEW[0]
    backbone = case.backbone()
    enliven(backbone)
    gated = dynnet.wrap(backbone, ["layer1"], gates=GateConfig(unit=1), input_size=case.size)
    chosen = torch.Generator().manual_seed(0)
    for network in gated.gates.networks:  # some channels are open for all images, the others for none
        on = torch.rand(network.logits.out_features, generator=chosen) < 0.4
        torch.nn.init.zeros_(network.logits.weight)
        network.logits.bias.data = torch.where(on, 5.0, -5.0)
    images = case.images(4)
    model = dynnet.consolidate(gated, loader(case), [0.5, 1.0], unit=1)
    model.gates.choose([0] * len(model.gates.plan.regions))
    for norm in model.gates.norms:  # as remembered before
        assert norm.mean.isfinite().all()
    # Of the units behind the exit, half are left, among them all that the gates had open.
    decisions = gated.forward_exits(images).decisions
    behind = [number for number, region in enumerate(gated.gates.plan.regions) if region.segment == 1]
    assert all(decisions.taken[number].decisions.mean() < 0.5 for number in behind)
    assert model.predict(images).macs.float().mean() < gated.ledger().dense


def test_a_measure_of_ones_own_goes_along() -> None:
    def surest(logits: torch.Tensor) -> torch.Tensor:
        return logits.amax(1)

    gated = FEW[0].wrapped(["layer1"], gates="channel", confidence=surest)
    gated.thresholds = [0.25]
    model = dynnet.consolidate(gated, loader(FEW[0]), [0.5, 1.0])
    assert model.measure.name == model.config.confidence == gated.measure.name
    images = FEW[0].images(4)
    assert torch.equal(dynnet.fold(model).predict(images).exit, model.predict(images).exit)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_shares_of_widths_rise_and_end_with_all(count: int) -> None:
    generator = np.random.default_rng(0)
    for opened in (0.05, 0.5, 0.97):
        masks = [generator.random((50, 32)) < opened for _ in range(2)]
        shares = _shares(count, masks)
        assert len(shares) == count
        assert list(shares) == sorted(set(shares))
        assert shares[0] > 0
        assert shares[-1] == 1.0
    spread = [np.arange(32)[None] < np.arange(1, 33)[:, None]]  # n units are open for image n
    assert _shares(4, spread) == (0.125, 0.375, 0.625, 1.0)


def test_what_cannot_be_consolidated_is_told(tmp_path: Path, recipe: Path, gated_run: Path) -> None:
    with pytest.raises(GateError, match="no gates on channels to consolidate; wrap with gates='channel'"):
        dynnet.consolidate(FEW[0].wrapped(), loader(FEW[0]))
    with pytest.raises(GateError, match="no gates on channels to consolidate"):
        dynnet.consolidate(FEW[0].wrapped(gates="width"), loader(FEW[0]))
    gated = FEW[0].wrapped(gates="channel")
    with pytest.raises(GateError, match="widths=1: give 2 or more"):
        dynnet.consolidate(gated, loader(FEW[0]), 1)
    with pytest.raises(GateError, match="give 2 to 8 shares"):
        dynnet.consolidate(gated, loader(FEW[0]), [0.5, 0.25])
    assert gated.predict(FEW[0].images(2)).logits.isfinite().all()


def test_a_run_consolidates_trains_and_resumes(gated_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "widths"
    argv = ["--recipe", str(gated_run / "recipe.yaml"), "--out", str(out), f"--consolidate.gated={gated_run}"]
    argv += ["--backbone.name", "cifar_resnet56"]  # which the gated model's takes the place of
    stages = ["--dense.epochs=0", "--heads.epochs=0", "--joint.epochs=1"]
    widths = ["--wrap.exits", "[layer1.0, layer2.0]", "--wrap.gates", "{unit: 2, widths: [0.5, 1.0]}"]
    assert train.main([*argv, *stages, *widths]) == 0
    model = dynnet.load(out / "model.safetensors")
    assert isinstance(model.gates, Routers)
    assert model.exits == ("layer1.0", "layer2.0")
    assert train.main(["--out", str(out), "--resume"]) == 0
    others = [*argv[:3], str(tmp_path / "y"), *argv[4:], *stages, *widths, "--data.mean", "[0.1]"]
    assert train.main(others) == 2
    plain = [*argv[:3], str(tmp_path / "x"), argv[4], *stages]
    assert train.main([*plain, "--wrap.exits", "[layer1.0]", "--wrap.gates", "{unit: 2}"]) == 2
