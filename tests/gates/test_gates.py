"""Gates: masked is the reference, skipped is the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynnet
from dynnet.backbone.counting import flop_counter
from dynnet.errors import CalibrationError, GateError, NonFiniteError
from dynnet.gates.freezing import cut_frozen_, mean_masks
from dynnet.gates.plan import GateConfig
from dynnet.thresholds.goals import Budget
from tests.cases import CHAIN, CHANNELWISE, Case, channelwise, enliven, leave_one_by_one, open_at_random
from tests.gates.gated import GATED, SMALL, difference, gated, predict_alone
from tests.generated import PARTS, Generated


@pytest.mark.parametrize("case", GATED, ids=str)
@torch.no_grad()
def test_skipped_equals_masked_and_is_billed_exactly(case: Case) -> None:
    backbone, images = case.backbone(), case.images(6)
    enliven(backbone)
    plain = backbone(images)
    model = dynnet.wrap(backbone, [1 / 3, 2 / 3], gates="channel", input_size=case.size)
    # Nothing is decided yet about who leaves: all gates open is plain timm, bit for bit.
    open_at_random(model, bias=1e6)
    model.execution = "masked"
    assert torch.equal(model(images), plain)
    for bias in (-2.0, 0.0, 2.0):
        open_at_random(model, bias=bias)
        leave_one_by_one(model, images)
        model.execution = "masked"
        masked = model.predict(images)
        sparse = predict_alone(model, images)
        together = model.predict(images)
        for skipped in (sparse, together):
            assert difference(skipped.logits, masked.logits) < 1e-4
            assert skipped.exit.tolist() == masked.exit.tolist()
            assert skipped.macs.tolist() == masked.macs.tolist()
        assert difference(masked.logits, plain) > 1e-3
    # The bill of every sample is what a counter sees of it alone.
    for i in range(6):
        with flop_counter() as counter:
            model(images[i : i + 1])
        assert counter.get_total_flops() == sparse.flops[i]
    assert model.unwrap() is backbone
    assert not any("forward" in vars(m) for m in backbone.modules())
    assert torch.equal(backbone(images), plain)


@pytest.mark.parametrize("kind", CHANNELWISE)
@torch.no_grad()
def test_skipped_equals_masked_behind_every_kind_that_passes_channels_on(kind: str) -> None:
    images = torch.randn(5, *CHAIN)
    model = dynnet.wrap(channelwise(kind), [], gates=GateConfig(unit=4), input_size=CHAIN)
    open_at_random(model)
    assert {site.layer for site in model.gates.plan.sites} == {"3", "4", "8"}
    model.execution = "masked"
    masked = model.predict(images)
    sparse = predict_alone(model, images)
    assert difference(sparse.logits, masked.logits) < 1e-4
    assert sparse.macs.tolist() == masked.macs.tolist()
    assert difference(masked.logits, model.unwrap()(images)) > 1e-3


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4),
    width=st.sampled_from([8, 16, 24]),
    block=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_skipped_equals_masked_on_any_network(parts: list[str], width: int, block: int, seed: int) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    if set(parts) <= {"plain"}:
        parts = [*parts, "basic"]  # a single link may save less than its gate would cost
    net = Generated(parts, width, seed).eval()
    enliven(net, seed)
    model = dynnet.wrap(net, [], gates=GateConfig(unit=block), input_size=(3, 16, 16))
    open_at_random(model, seed)
    model.execution = "masked"
    masked = model.predict(images)
    sparse = predict_alone(model, images)
    assert difference(sparse.logits, masked.logits) < 1e-4
    assert sparse.macs.tolist() == masked.macs.tolist()
    for i in range(3):
        with flop_counter() as counter:
            model(images[i : i + 1])
        assert counter.get_total_flops() == sparse.flops[i]


def test_two_inputs_get_two_masks_and_one_unit_stays_open() -> None:
    model = gated()
    decisions = model.forward_exits(SMALL.images(6)).decisions
    assert decisions is not None
    assert any(len(taken.decisions.unique(dim=0)) > 1 for taken in decisions.taken.values())
    open_at_random(model, bias=-1e6)
    images = SMALL.images(2)
    closed = model.forward_exits(images).decisions
    assert closed is not None
    for number, taken in closed.taken.items():
        for part in taken.decisions.split(model.gates.plan.regions[number].groups, 1):
            assert (part.sum(1) == 1).all()
    model.execution = "masked"
    masked = model(images)
    assert difference(predict_alone(model, images).logits, masked) < 1e-4


def test_nan_in_a_gate_network_opens_everything() -> None:
    model, images = gated(), SMALL.images(2)
    for network in model.gates.networks:
        nn.init.constant_(network.logits.bias, float("nan"))
    model.execution = "masked"
    assert torch.equal(model(images), model.backbone(images))
    # Whoever counts on its answers is told.
    with pytest.raises(NonFiniteError, match="gate network of region 0, at layer1.0.conv1, gave NaN for 2 of samples"):
        dynnet.measure(model, [(images, torch.zeros(2, dtype=torch.long))])


@pytest.mark.parametrize(
    "case", [SMALL, *(case for case in GATED if case.name in {"test_convnext", "test_vit"})], ids=str
)
@torch.no_grad()
def test_frozen_gates_decide_alike_for_all_and_skip_in_batches(case: Case) -> None:
    model, images = gated(case, exits=[0.5]), case.images(4)
    masks = mean_masks(dynnet.measure(model, [(images, torch.zeros(4).long())]).answers.masks, model.gates.plan)
    deciding = model.predict(images)
    model.gates.freeze(masks)
    model.execution = "masked"
    masked = model.predict(images)
    model.execution = "sparse"
    sparse = model.predict(images)
    assert difference(sparse.logits, masked.logits) < 1e-4
    assert torch.equal(sparse.macs, masked.macs)
    assert len(sparse.macs.unique()) == 1
    with flop_counter() as counter:
        model(images)
    assert counter.get_total_flops() == sparse.flops.sum()
    # As many units are open as before, so the bill is near; the networks are not on it any more.
    assert abs(float(sparse.macs.double().mean() / deciding.macs.double().mean()) - 1) < 0.15
    model.gates.thaw()
    assert torch.equal(model.predict(images).logits, deciding.logits)


def test_a_batch_skips_what_is_closed_for_all_of_its_images() -> None:
    model, images = gated(unit=1), SMALL.images(3)
    open_at_random(model, bias=-2.0)
    counted, billed = [], []
    for execution in ("masked", "sparse"):
        model.execution = execution
        with flop_counter() as counter:
            model(images)
        counted.append(counter.get_total_flops())
        billed.append(int(model.predict(images).flops.sum()))
    assert billed[0] == billed[1] < counted[1] < 0.9 * counted[0]


def test_masks_that_do_not_fit_are_refused() -> None:
    model = gated()
    units = [region.units for region in model.gates.plan.regions]
    good = [torch.ones(u, dtype=torch.bool) for u in units]
    first = model.gates.plan.regions[0].layer
    for masks, message in (
        (good[1:], f"got {len(good) - 1} masks for {len(good)} regions"),
        ([good[0][1:], *good[1:]], rf"region 0 \(at {first}\) is torch.bool of shape .*give torch.bool of shape"),
        ([good[0].float(), *good[1:]], "is torch.float32 of shape"),
        ([~good[0], *good[1:]], "closes a group; leave one unit open"),
    ):
        with pytest.raises(GateError, match=message):
            model.gates.freeze(masks)
    assert model.gates.frozen is None


def test_the_floor_is_what_the_cheapest_sample_costs() -> None:
    for exits in ([], ["layer2.0"]):
        # Of 20 channels in units of 3 the last has 2: with it alone a sample is cheapest.
        model = gated(Case("cifar_resnet20", (3, 32, 32), {"width": 1.25}), exits=exits, unit=3)
        last = [torch.arange(region.units) for region in model.gates.plan.regions]
        for network, region, number in zip(model.gates.networks, model.gates.plan.regions, last, strict=True):
            keep = torch.tensor([sum(region.groups[: i + 1]) - 1 for i in range(len(region.groups))])
            nn.init.zeros_(network.logits.weight)
            network.logits.bias.data = torch.where(torch.isin(number, keep), 1.0, -1.0)
        model.thresholds = [-float("inf")] * len(exits)
        assert model.predict(SMALL.images(1)).macs.item() == model.floor()
        with pytest.raises(CalibrationError, match="cannot be met"):
            Budget(0.99 * model.floor() / model.ledger().dense).check(model)
        Budget(1.01 * model.floor() / model.ledger().dense).check(model)


@pytest.mark.parametrize("name", ["cifar_resnet20", "test_vit"])
@torch.no_grad()
def test_frozen_gates_can_be_cut_out_for_good(name: str) -> None:
    case = next(case for case in [SMALL, *GATED] if case.name == name)
    model, images = gated(case), case.images(3)
    with pytest.raises(GateError, match="freeze them first"):
        cut_frozen_(model.backbone, model.gates)
    model.gates.freeze([torch.arange(region.units) % 2 == 1 for region in model.gates.plan.regions])
    expected = model.predict(images)
    backbone = model.unwrap()
    cut_frozen_(backbone, model.gates)
    assert difference(backbone(images), expected.logits) < 1e-4
    with flop_counter() as counter:
        backbone(images)
    assert counter.get_total_flops() == expected.flops.sum()
    # What is left is a plain model: it trains and is wrapped again.
    assert dynnet.wrap(backbone, [], gates="channel", input_size=case.size).ledger().dense == expected.macs[0]


def test_gradients_reach_the_gates() -> None:
    model = gated(exits=["layer2.0"]).train()
    outputs = model(SMALL.images(4))
    bill = outputs.decisions.price(model.ledger(), 4).sum(1)
    (outputs.logits[-1].square().mean() + bill.mean() / model.ledger().dense).backward()
    for network in model.gates.networks:
        assert network.hidden.weight.grad.abs().sum() > 0
        assert network.logits.bias.grad.abs().sum() > 0
    # The bill alone would close a gate: the last one, which no other listens to.
    model.zero_grad()
    model.gates.noise = 0.0
    model(SMALL.images(4)).decisions.price(model.ledger(), 4).sum(1).mean().backward()
    last = model.gates.networks[-1].logits.bias.grad
    assert (last >= 0).all()
    assert (last > 0).any()


def test_thresholds_are_fitted_on_what_gated_samples_cost() -> None:
    model = gated(exits=["layer2.0", "layer3.0"])
    batches = [(SMALL.images(40), torch.arange(40) % 7)]
    fitted = dynnet.calibrate(model, batches, budget=0.7)
    measured = dynnet.measure(model, batches)
    assert measured.macs.mean() == pytest.approx(fitted.macs)
    assert fitted.macs <= 0.7 * fitted.dense_macs
    # Half of the channels are closed: never exiting is far below the dense bill.
    never = measured.answers.bills(measured.ledger, [False, False])[:, -1]
    assert 0.2 < never.mean() / fitted.dense_macs < 0.8


def test_decisions_are_hard_in_any_precision() -> None:
    model = gated().train()
    with torch.autocast("cpu", torch.bfloat16):
        decisions = model(SMALL.images(4)).decisions
    assert decisions is not None
    for taken in decisions.taken.values():
        assert taken.decisions.requires_grad
        assert set(taken.decisions.unique().tolist()) <= {0.0, 1.0}
    half, images = gated().to(torch.bfloat16), SMALL.images(3).to(torch.bfloat16)
    half.execution = "masked"
    masked = half.predict(images)
    assert masked.logits.dtype == torch.bfloat16
    assert masked.macs.dtype == torch.int64
    assert difference(predict_alone(half, images).logits.float(), masked.logits.float()) < 0.05


def test_gates_read_means_that_half_precision_could_not_sum() -> None:
    model, images = gated().half(), torch.full((2, 3, 32, 32), 6.0, dtype=torch.float16)
    nn.init.constant_(model.backbone.conv1.weight, 4.0)  # sums of 1,024 pixels pass 65,504
    decisions = model.forward_exits(images).decisions
    assert decisions is not None
    assert decisions.taken[0].logits.isfinite().all()


def test_noise_is_for_training_only() -> None:
    model, images = gated(), SMALL.images(4)
    assert torch.equal(model.forward_exits(images).logits[0], model.forward_exits(images).logits[0])
    model.train()
    model.gates.noise = 0.0
    for m in model.backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    quiet = [model(images).logits[0] for _ in range(2)]
    assert torch.equal(*quiet)
    model.gates.noise = 1.0
    assert not torch.equal(model(images).logits[0], quiet[0])


def test_an_unknown_execution_is_refused() -> None:
    with pytest.raises(GateError, match="execution='fast': choose from sparse, masked"):
        gated().execution = "fast"
