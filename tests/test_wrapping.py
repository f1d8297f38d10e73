"""What must hold on every backbone: cases x invariants."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import dynnet
from dynnet.backbone.counting import flop_counter
from dynnet.errors import ExitError, HeadError, InputError
from dynnet.exits import flow
from tests.cases import CASES, CLASSES, FEW, Case, leave_one_by_one, tiny


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_backbone_keeps_its_promises(case: Case) -> None:
    """One wrap a backbone, as building it is what costs."""
    backbone, images = case.backbone(), case.images()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    plain = backbone(images)
    model = dynnet.wrap(backbone, [1 / 3, 2 / 3], input_size=case.size)
    shares = [b.macs_share for b in model.boundaries]
    assert 0 < shares[0] < shares[1] < 1

    # Never exiting is plain timm, bit for bit: with all heads off, and with heads that run but never convince.
    assert torch.equal(model(images), plain)
    model.thresholds = [2.0, 2.0]
    never = model.predict(images)
    assert torch.equal(never.logits, plain)
    assert never.exit.tolist() == [2] * 5

    # A sample answers the same alone and in company, and the answers come back in order.
    expected = leave_one_by_one(model, images)
    together = model.predict(images)
    assert together.exit.tolist() == expected.tolist()
    assert set(together.exit.tolist()) == {0, 1, 2}
    for i in range(5):
        alone = model.predict(images[i : i + 1])
        assert alone.exit.item() == together.exit[i]
        assert alone.macs.item() == together.macs[i]
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.confidence[0], together.confidence[i], atol=1e-4, rtol=1e-4)
        # Its bill is what a counter sees.
        with flop_counter() as counter:
            model(images[i : i + 1])
        assert counter.get_total_flops() == 2 * together.macs[i] == together.flops[i]
    assert not model.ledger().unpriced

    # The backbone comes back as it was.
    assert model.unwrap() is backbone
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(backbone(images), plain)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_reaches_everything(case: Case) -> None:
    model = case.wrapped().train()
    outputs = model(case.images(2), equilibrium=True)
    assert [x.shape for x in outputs.logits] == [(2, CLASSES)] * 3
    sum(x.float().logsumexp(1).sum() for x in outputs.logits).backward()
    silent = [name for name, p in model.heads.named_parameters() if p.grad is None]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_once_all_have_left_nothing_downstream_runs() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    model.thresholds = [-float("inf")]
    ran = []
    model.backbone.get_submodule("1").register_forward_hook(lambda *_: ran.append(1))
    assert model.predict(torch.randn(3, 3, 32, 32)).exit.tolist() == [0, 0, 0]
    assert not ran
    model.thresholds = [float("inf")]
    model(torch.randn(3, 3, 32, 32))
    assert ran


def test_an_exit_at_inf_is_switched_off_and_free() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    ran = []
    model.heads[0].register_forward_hook(lambda *_: ran.append(1))
    model.thresholds = [float("inf"), -float("inf")]
    prediction = model.predict(torch.randn(2, 3, 32, 32))
    assert not ran
    ledger = model.ledger()
    assert prediction.macs.tolist() == [sum(s.macs for s in ledger.segments[:2]) + ledger.heads[1]] * 2


@pytest.mark.parametrize("confidence", ["max_probability", "margin", "entropy", "patience", lambda x: x.amax(1)])
def test_nan_never_leaves(confidence: object) -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32), confidence=confidence)
    with torch.no_grad():
        model.heads[0].classifier.weight.fill_(float("nan"))
    model.thresholds = [-float("inf")]
    prediction = model.predict(torch.randn(3, 3, 32, 32))
    assert prediction.exit.tolist() == [1, 1, 1]
    assert prediction.logits.isfinite().all()


def test_a_copy_is_its_own_model() -> None:
    case = FEW[0]
    model = case.wrapped()
    twin = copy.deepcopy(model)
    leave_one_by_one(twin, case.images())
    assert model.thresholds == (float("inf"),) * 2
    answers = twin.predict(case.images())
    assert set(answers.exit.tolist()) == {0, 1, 2}
    model.unwrap()
    with pytest.raises(InputError, match="this model was unwrapped"):
        model(case.images())
    assert torch.equal(twin.predict(case.images()).exit, answers.exit)
    assert flow.is_attached(twin.backbone)
    twin.unwrap()
    assert not flow.is_attached(twin.backbone)


def test_threads_do_not_disturb_each_other() -> None:
    case = FEW[0]
    model = case.wrapped()
    batches = [torch.randn(6, *case.size) for _ in range(12)]
    leave_one_by_one(model, torch.cat(batches))
    alone = [model.predict(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(model.predict, batches))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.exit, b.exit)
        torch.testing.assert_close(a.logits, b.logits)


def test_new_sizes_may_be_priced_while_others_run() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    with ThreadPoolExecutor(3) as pool:
        sizes = pool.map(lambda side: model.predict(torch.randn(1, 3, side, side)).macs.item(), range(33, 63))
        for _ in range(200):
            model.predict(torch.randn(1, 3, 32, 32))
        assert list(sizes) == [model.ledger((3, side, side)).dense for side in range(33, 63)]


def test_position_embeddings_are_spared_by_weight_decay() -> None:
    case = next(c for c in CASES if c.name == "vit_tiny_patch16_224")
    assert "backbone.pos_embed" in case.wrapped().no_weight_decay()
    assert FEW[0].wrapped().no_weight_decay() == set()


def test_modes_and_types_follow() -> None:
    case = FEW[0]
    assert not case.wrapped().training
    assert dynnet.wrap(case.backbone().train(), 1, input_size=case.size).heads[0].training
    model = case.wrapped().to(torch.bfloat16)
    assert model(case.images().bfloat16()).dtype == torch.bfloat16
    model = case.wrapped().to(memory_format=torch.channels_last)
    leave_one_by_one(model, case.images())
    seen = []
    model.backbone.layer3.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(case.images())
    assert len(seen[0]) < 5
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        model(case.images())


def test_state_dict_round_trips() -> None:
    case = FEW[0]
    model, other = case.wrapped(), case.wrapped()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(case.images()), other(case.images()))


def test_exits_may_be_named_and_heads_may_be_yours() -> None:
    model = dynnet.wrap(
        tiny(),
        ["1"],
        input_size=(3, 32, 32),
        heads=lambda boundary, k: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(boundary.features[0].channels, k)
        ),
    )
    assert model.exits == ("1",)
    assert isinstance(model.heads[0], nn.Sequential)


def test_other_input_sizes_are_priced_anew() -> None:
    case = FEW[0]
    model = case.wrapped()
    small, large = model.predict(torch.randn(1, 3, 32, 32)), model.predict(torch.randn(1, 3, 64, 64))
    assert 3.9 < large.macs.item() / small.macs.item() <= 4


def test_a_failed_wrap_leaves_the_backbone_untouched() -> None:
    backbone = tiny()
    with pytest.raises(HeadError, match=r"the head of exit '1' answers \(\d+, 9\) where \(B, K\) = \(\d+, 4\)"):
        dynnet.wrap(
            backbone,
            ["1"],
            input_size=(3, 32, 32),
            heads=lambda b, k: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 9)),
        )
    with pytest.raises(HeadError, match="a head does not fit its boundary"):
        dynnet.wrap(backbone, ["1"], input_size=(3, 32, 32), heads=lambda b, k: nn.Linear(5, k))
    with pytest.raises(HeadError, match="is a int; build a torch"):
        dynnet.wrap(backbone, ["1"], input_size=(3, 32, 32), heads=lambda b, k: 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert not any(p.device.type == "meta" for p in backbone.parameters())
    assert not backbone.training


def test_wrapping_twice_is_refused() -> None:
    model = dynnet.wrap(tiny(), 1, input_size=(3, 32, 32))
    for again in (model, model.backbone):
        with pytest.raises(ExitError, match=r"wrapped already; call unwrap\(\) first"):
            dynnet.wrap(again, 1, input_size=(3, 32, 32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8 .* expected float images"),
        (torch.zeros(2, 1, 32, 32), r"shape \(2, 1, 32, 32\); expected float images of shape \(B, 3, H, W\)"),
        (torch.zeros(3, 32, 32), "expected float images"),
        (torch.zeros(0, 3, 32, 32), "empty batch"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), r"images of torch.float64 for a model of torch.float32"),
        ([1, 2], "got list; expected float images"),
    ],
)
def test_wrong_images_are_refused(images: object, message: str) -> None:
    model = dynnet.wrap(tiny(), 1, input_size=(3, 32, 32))
    with pytest.raises(InputError, match=message):
        model(images)


def test_a_size_that_does_not_fit_is_told() -> None:
    case = next(c for c in CASES if c.name == "vit_tiny_patch16_224")
    with pytest.raises(InputError, match=r"cannot take images of size \(3, 50, 50\)"):
        case.wrapped().predict(torch.randn(1, 3, 50, 50))


def test_predict_wants_eval_mode() -> None:
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        FEW[0].wrapped().train().predict(FEW[0].images())


class HandedOn(nn.Module):
    """Hands a feature map on untouched, past an exit, to a block whose exit reads it, as CoaT does."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, old: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return old, self.conv(x).relu()

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        old = self.first(x)
        x = self.second(old)
        for block in self.blocks:
            old, x = block(old, x)
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
def test_what_is_handed_on_past_an_exit_loses_its_rows_as_well() -> None:
    model = dynnet.wrap(HandedOn().eval(), ["second", "blocks.1"], input_size=(3, 16, 16))
    assert len(model.boundaries[1].features) == 2
    images = torch.randn(6, 3, 16, 16)
    expected = leave_one_by_one(model, images)
    together = model.predict(images)
    assert together.exit.tolist() == expected.tolist()
    for i in range(6):
        torch.testing.assert_close(model.predict(images[i : i + 1]).logits[0], together.logits[i])
