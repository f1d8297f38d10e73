"""A few nested widths, of which routers at the exits choose one for each sample."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import dynnet
from dynnet import GateConfig, loss
from dynnet.certificate import subject_of
from dynnet.deploy import Runner
from dynnet.deploy.one_width import at_widths
from dynnet.errors import CalibrationError, CascadeError, CheckpointError, ExitError, GateError
from dynnet.gates.freezing import mean_masks, widths_of
from dynnet.thresholds import leaning
from dynnet.thresholds.answers import collect
from tests.cases import FEW, Case
from tests.gates.routed import ABLE, MORE, SOME, WIDTHS, routed, widths_taken


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in SOME else pytest.mark.sweep) for case in ABLE], ids=str
)
def test_narrow_is_masked_and_nobody_looks_at_neighbours(case: Case) -> None:
    model, _, images = routed(case)
    assert max(len(set(taken)) for taken in widths_taken(model, images)) > 1
    model.thresholds = [0.5, 0.5]
    together = model.predict(images)
    scale = together.logits.abs().max() + 1e-6
    model.execution = "masked"
    masked = model.predict(images)
    model.execution = "sparse"
    assert (masked.logits - together.logits).abs().max() < 1e-4 * scale
    assert torch.equal(masked.macs, together.macs)
    alone = [model.predict(image[None]) for image in images]
    assert (torch.cat([one.logits for one in alone]) - together.logits).abs().max() < 1e-4 * scale
    assert torch.equal(torch.cat([one.macs for one in alone]), together.macs)
    assert all(check.kept for check in dynnet.verify(model, images[:3]).checks)


@pytest.mark.parametrize("case", [*SOME, *(pytest.param(case, marks=pytest.mark.sweep) for case in MORE)], ids=str)
def test_each_width_is_a_narrow_network_cut_for_good(case: Case) -> None:
    model, gates, images = routed(case)
    regions = gates.plan.regions
    parameters = []
    for widths in itertools.islice(itertools.product(range(3), repeat=len(regions)), 9):
        narrow = at_widths(model, widths)
        gates.choose(widths)
        ours, theirs = model.predict(images), narrow.predict(images)
        assert (ours.logits - theirs.logits).abs().max() < 1e-5 * (ours.logits.abs().max() + 1e-6)
        assert torch.equal(ours.macs, theirs.macs)
        parameters.append(sum(p.numel() for p in narrow.backbone.parameters()))
    gates.thaw()
    assert parameters[0] < parameters[-1] <= sum(p.numel() for p in model.backbone.parameters())
    folded = dynnet.fold(model)
    ours, theirs = model.predict(images), folded.predict(images)
    assert (ours.logits - theirs.logits).abs().max() < 1e-4 * (ours.logits.abs().max() + 1e-6)
    assert torch.equal(ours.macs, theirs.macs)


def test_containers_hold_all_that_changes_and_nothing_that_is_seen_elsewhere() -> None:
    backbone = timm.create_model("resnet18", num_classes=5).eval()
    model = dynnet.wrap(backbone, ["layer1", "layer2.0"], gates="width", input_size=(3, 64, 64))
    names = [container.name for container in model.gates.plan.containers]
    assert names == ["layer2.0", "layer2.1", "layer3", "layer4"]  # layer2 itself ends behind an exit
    assert [region.segment for region in model.gates.plan.regions] == [1, 2]
    assert not any(site.layer.startswith("layer1") for site in model.gates.plan.sites)
    assert "forward" in vars(backbone.layer3)
    model.unwrap()
    assert not any("forward" in vars(module) for module in backbone.modules())


def test_the_widest_is_the_backbone_and_routers_cost_what_they_cost() -> None:
    case = FEW[0]
    model, gates, images = routed(case)
    plain = model.run_every_exit(images).logits[-1]
    gates.choose([2, 2])
    assert torch.equal(model.predict(images).logits, plain)
    assert model.predict(images).macs.tolist() == [model.ledger().dense] * 6
    gates.thaw()
    routers = sum(region.macs for region in gates.plan.regions)
    assert 0 < routers < 0.01 * model.ledger().dense
    chosen = torch.tensor(widths_taken(model, images))
    bills = {}
    for widths in sorted({tuple(column) for column in chosen.T.tolist()}):
        gates.choose(widths)
        bills[widths] = int(model.predict(images[:1]).macs) + routers
        gates.thaw()
    assert model.predict(images).macs.tolist() == [bills[tuple(column)] for column in chosen.T.tolist()]


def test_a_router_that_gives_nan_takes_the_widest() -> None:
    model, gates, images = routed(FEW[0])
    for network in gates.networks:
        nn.init.constant_(network.logits.bias, float("nan"))
    gates_free = model.run_every_exit(images).logits[-1]
    assert torch.equal(model.predict(images).logits, gates_free)


def test_all_widths_learn_and_routers_feel_what_others_would_have_given() -> None:
    model, gates, images = routed(FEW[0])
    model.train()
    before = [norm.mean.clone() for norm in gates.norms]
    outputs = model(images)
    assert outputs.decisions is not None
    price = outputs.decisions.price(model.ledger(), len(images)).sum() / model.ledger().dense
    (dynnet.loss(outputs, torch.arange(6)) + price).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert any(p.grad.abs().sum() > 0 for p in gates.networks[0].parameters())
    assert all(not torch.equal(old, norm.mean) for old, norm in zip(before, gates.norms, strict=True))


def test_files_keep_widths_routers_and_what_norms_remember(tmp_path: Path) -> None:
    model, _, images = routed(FEW[0])
    dynnet.save(model, tmp_path / "model.safetensors")
    again = dynnet.load(tmp_path / "model.safetensors")
    assert again.config.gates == GateConfig(unit=2, widths=WIDTHS)
    ours, theirs = model.predict(images), again.predict(images)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.macs, theirs.macs)
    with pytest.raises(CheckpointError, match="folded has copies of its weights; save what it was folded from"):
        dynnet.save(dynnet.fold(model), tmp_path / "folded.safetensors")


def test_in_a_row_a_router_would_stand_elsewhere() -> None:
    model, _, _ = routed(FEW[0])
    with pytest.raises(CascadeError, match="gates of the members decide on other regions in a row than alone"):
        dynnet.cascade([FEW[0].backbone(), model])


@pytest.mark.parametrize(
    ("gates", "exits", "error", "message"),
    [
        ("width", [], GateError, "widths are picked at exits, and there are none; give exits="),
        (GateConfig(widths=(0.5,)), 1, GateError, r"widths=\(0.5,\): give 2 to 8 shares .* rising, such as \(0.25"),
        (GateConfig(widths=(1.0, 0.5)), 1, GateError, "rising"),
        (GateConfig(widths=(0.0, 0.5)), 1, GateError, "rising"),
        (GateConfig(widths=tuple(n / 10 for n in range(1, 10))), 1, GateError, "give 2 to 8"),
        (GateConfig(unit=0, widths=(0.5, 1.0)), 1, GateError, "unit=0: give a number of 1 or more"),
        (GateConfig(exclude=("layer9",), widths=(0.5, 1.0)), 1, GateError, "layer9"),
        (GateConfig(exclude=("layer2", "layer3"), widths=(0.5, 1.0)), 1, GateError, "has no channels to gate: .*excl"),
        (GateConfig(widths=(0.5, 1.0)), ["layer7"], ExitError, "no boundary 'layer7'"),
    ],
)
def test_impossible_widths_are_refused(gates: object, exits: object, error: type[Exception], message: str) -> None:
    backbone = FEW[0].backbone()
    with pytest.raises(error, match=message):
        dynnet.wrap(backbone, exits, gates=gates, input_size=(3, 32, 32))
    assert not any("forward" in vars(module) for module in backbone.modules())


def test_routers_are_asked_for_widths_that_there_are() -> None:
    model, gates, _ = routed(FEW[0])
    with pytest.raises(GateError, match=r"widths \[3, 0\]: give a number from 0 to 2 for each of 2 regions"):
        gates.choose([3, 0])
    with pytest.raises(GateError, match="this model has no routers; wrap it with gates='width'"):
        at_widths(FEW[0].wrapped(), [0])
    masks = [region.masks[1] for region in gates.plan.regions]
    gates.freeze(masks)
    assert gates.chosen == (1, 1)
    masks[0] = ~masks[0]
    with pytest.raises(GateError, match=r"the mask of region 0 \(at layer2.0.conv1\) is none of its widths"):
        gates.freeze(masks)
    assert gates.chosen is None
    assert model.gates is gates


def test_widths_learn_in_half_precision() -> None:
    model, _, images = routed(FEW[0])
    model.bfloat16().train()
    outputs = model(images.bfloat16())
    loss(outputs, torch.zeros(6, dtype=torch.long)).backward()
    assert outputs.decisions is not None
    assert bool(torch.stack([x.isfinite().all() for x in outputs.logits]).all())


def test_a_chosen_width_is_what_is_exported_and_certified(tmp_path: Path) -> None:
    model, gates, images = routed(FEW[0])
    subject = subject_of(model)
    gates.choose([1] * len(gates.plan.regions))
    assert subject_of(model) != subject
    expected = model.predict(images)
    dynnet.export(model, tmp_path / "stages", engine="torch")
    found = Runner(tmp_path / "stages", threads=1).predict(images.numpy())
    assert found.macs.tolist() == expected.macs.tolist()
    assert torch.allclose(torch.from_numpy(found.logits), expected.logits, atol=1e-4)
    gates.thaw()
    assert subject_of(model) == subject


def test_the_mean_of_what_routers_choose_is_a_width() -> None:
    model, gates, images = routed(FEW[0])
    answers = collect(model, [(images, torch.zeros(6, dtype=torch.long))])
    taken = widths_taken(model, images)
    for mask, region, widths in zip(answers.masks, gates.plan.regions, taken, strict=True):
        assert widths_of(mask, region).tolist() == widths
    gates.freeze(mean_masks(answers.masks, gates.plan))
    assert gates.chosen == tuple(round(sum(widths) / 6) for widths in taken)


def test_a_time_is_met_by_budgets_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gates, images = routed(FEW[0])
    loader = [(images, torch.arange(6))]
    ledger, timed = model.ledger(), []

    class AsLongAsItCosts:
        """Times that are known: a millisecond for the bare backbone, half as much again as MACs say for the model."""

        engine, threads, batch_size, dense_ms = "an engine", 1, 1, 1.0

        def __init__(self, *_: object) -> None:
            pass

        def share(self, at: dynnet.DynamicModel, key: float) -> float:
            found = [at.predict(some).macs.double().mean() for some, _ in loader]
            timed.append(1.5 * float(sum(found)) / len(found) / ledger.dense)
            return timed[-1]

    monkeypatch.setattr(leaning, "WholeTimes", AsLongAsItCosts)
    least = 1.5 * model.floor() / ledger.dense
    with pytest.raises(
        CalibrationError, match="of the bare backbone's time in an engine cannot be met on these samples"
    ):
        dynnet.calibrate(model, loader, latency=0.9 * least)
    wanted = (least + 1.5) / 2
    fitted = dynnet.calibrate(model, loader, latency=wanted)
    assert fitted.clocked is not None
    assert fitted.lean is not None
    assert 0.8 * wanted < fitted.clocked.ms <= wanted
    assert fitted.clocked.ms == max(share for share in timed if share <= wanted)
    assert "1 ms" in str(fitted)
    assert 1.5 * dynnet.measure(model, loader).macs.mean() / ledger.dense == pytest.approx(fitted.clocked.ms)
    assert gates.frozen is None


@pytest.mark.sweep
def test_a_time_is_met_in_an_engine(tmp_path: Path) -> None:
    model, _, images = routed(FEW[0])
    fitted = dynnet.calibrate(model, [(images, torch.arange(6))], latency=50.0, batch_size=4)
    assert fitted.clocked is not None
    assert 0 < fitted.clocked.ms < 50 * fitted.clocked.dense_ms
    with pytest.raises(CalibrationError, match=r"the least that was tried took \d"):
        dynnet.calibrate(model, [(images, torch.arange(6))], latency=0.001)


def test_a_budget_is_met_by_thresholds_and_by_how_far_routers_lean() -> None:
    model, gates, images = routed(FEW[0])
    loader = [(images + 0.01 * n, torch.arange(6)) for n in range(4)]
    bills = {}
    for weight in (-1e3, 0.0, 1e3):
        gates.lean_(weight)
        bills[weight] = float(model.predict(images).macs.double().mean())
    assert bills[1e3] < bills[0.0] < bills[-1e3]
    narrowest = bills[1e3] / model.ledger().dense
    gates.lean_(0.0)
    fitted = dynnet.calibrate(model, iter(loader), budget=1.05 * narrowest)
    assert fitted.lean is not None
    assert fitted.macs <= 1.05 * narrowest * model.ledger().dense
    assert dynnet.measure(model, loader).macs.mean() == pytest.approx(fitted.macs)
    before = [network.lean.clone() for network in gates.networks]
    with pytest.raises(CalibrationError, match="a budget of 0.01 of the dense MACs cannot be met"):
        dynnet.calibrate(model, loader, budget=0.01)
    assert all(torch.equal(old, network.lean) for old, network in zip(before, gates.networks, strict=True))
