"""Cascades: what holds of exits holds of models in a row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynnet
from dynnet.backbone.chain import bare_of
from dynnet.backbone.host import prepare_
from dynnet.cascading import members_of
from dynnet.deploy import Runner
from dynnet.deploy.stage_times import StageTimes
from dynnet.errors import CascadeError, CheckpointError, DataError, InputError
from dynnet.files.bundles import read_bundle, write_bundle
from tests.cases import CASES, CLASSES, Case, enliven, leave_one_by_one, open_at_random

SMALL, LARGE = Case("cifar_resnet20", (3, 32, 32), {"width": 0.5}), Case("cifar_resnet20", (3, 32, 32))
CREATE = [{"model_name": case.name, "num_classes": CLASSES, **case.kwargs} for case in (SMALL, LARGE)]
MIXED = {
    case.name: case for case in CASES if case.name in ("resnet18", "test_efficientnet", "test_vit", "test_convnext")
}


def alive(case: Case, seed: int) -> nn.Module:
    backbone = case.backbone()
    enliven(backbone, seed)
    return backbone


def pair(**kwargs: Any) -> dynnet.DynamicModel:
    return dynnet.cascade([alive(SMALL, 0), alive(LARGE, 1)], **kwargs)


def images(count: int = 12, case: Case = LARGE) -> Tensor:
    return torch.randn(count, *case.size, generator=torch.Generator().manual_seed(1))


def wrapped(gates: str | None = None) -> dynnet.DynamicModel:
    model = dynnet.wrap(alive(LARGE, 1), ["layer1", "layer2"], input_size=LARGE.size, gates=gates).eval()
    if gates:
        open_at_random(model)
    leave_one_by_one(model, images())
    return model


def few_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)).eval()


@torch.no_grad()
@pytest.mark.parametrize("combine", ["last", "mean"])
def test_the_next_is_asked_only_where_the_one_before_is_unsure(combine: Any) -> None:
    small, large, x = alive(SMALL, 0), alive(LARGE, 1), images()
    model = dynnet.cascade([small, large], combine=combine)
    assert model.exits == ("members.0",)
    assert model.thresholds == (float("inf"),)
    first, second = small(x).softmax(1), large(x).softmax(1)
    threshold = float(first.amax(1).sort().values[5:7].mean())
    model.thresholds = [threshold]
    sure = first.amax(1) >= threshold
    assert 0 < sure.sum() < len(x)
    found = model.predict(x)
    assert found.exit.tolist() == (~sure).long().tolist()
    late = second if combine == "last" else (first + second) / 2
    torch.testing.assert_close(found.logits.softmax(1), torch.where(sure[:, None], first, late), atol=1e-5, rtol=0)
    costs = [dynnet.wrap(alive(case, 0), [], input_size=case.size).ledger().dense for case in (SMALL, LARGE)]
    assert found.macs.tolist() == [costs[0] if one else sum(costs) for one in sure]
    assert model.ledger().dense == costs[1]  # compared with the last member alone
    torch.testing.assert_close(bare_of(model)(x), large(x))
    assert small(x).shape == large(x).shape  # they are left as they are


@torch.no_grad()
@pytest.mark.parametrize("first", MIXED)
def test_invariants_hold_for_many_families(first: str) -> None:
    last = MIXED["resnet18"]
    model = dynnet.cascade(
        [alive(MIXED[first], 0), alive(last, 1)], input_sizes=[MIXED[first].size, last.size], combine="mean"
    )
    assert model.input_size == max(MIXED[first].size, last.size)
    found = dynnet.verify(model, torch.randn(4, *model.input_size))
    assert all(check.kept for check in found.checks)


@torch.no_grad()
@pytest.mark.parametrize("gates", [None, "channel"])
def test_exits_and_gates_of_members_go_on_deciding(gates: str | None) -> None:
    member, x = wrapped(gates), images()
    model = dynnet.cascade([alive(SMALL, 0), member])
    assert model.exits == ("members.0", "members.1.layer1", "members.1.layer2")
    assert model.thresholds == (float("inf"), *member.thresholds)
    mine, theirs = model.predict(x), member.predict(x)
    assert (mine.exit - 1).tolist() == theirs.exit.tolist()
    assert set(theirs.exit.tolist()) == {0, 1, 2}
    torch.testing.assert_close(mine.logits, theirs.logits)
    first = model.ledger().segments[0].macs
    assert (mine.macs - first).tolist() == theirs.macs.tolist()
    assert all(check.kept for check in dynnet.verify(model, x).checks)


@torch.no_grad()
def test_answers_inside_of_members_are_joined_too() -> None:
    small, member, x = alive(SMALL, 0), wrapped(), images()
    model = dynnet.cascade([small, member], combine="mean")
    first = small(x).softmax(1)
    alone = [logits.softmax(1) for logits in member.forward_exits(x).logits]
    expected = [first, *((first + one) / 2 for one in alone)]
    found = [logits.softmax(1) for logits in model.forward_exits(x).logits]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    taken = leave_one_by_one(model, x)
    answers = model.predict(x)
    assert answers.exit.tolist() == taken.tolist()
    assert set(taken.tolist()) == {0, 1, 2, 3}
    right = torch.stack(expected)[taken, torch.arange(len(x))]
    torch.testing.assert_close(answers.logits.softmax(1), right, atol=1e-5, rtol=0)
    # Where nobody leaves at the end of the first member, its answer is there all the same.
    model.thresholds = [float("inf"), *model.thresholds[1:]]
    late = model.predict(x)
    assert set(late.exit.tolist()) <= {1, 2, 3}
    right = torch.stack(expected)[late.exit, torch.arange(len(x))]
    torch.testing.assert_close(late.logits.softmax(1), right, atol=1e-5, rtol=0)
    assert all(check.kept for check in dynnet.verify(model, x).checks)


@torch.no_grad()
def test_a_member_gets_images_as_it_was_made_for_them() -> None:
    small, large = alive(SMALL, 0), alive(LARGE, 1)
    prepare_(small, {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.4, 0.2)})
    prepare_(
        large, {"mean": (0.4, 0.5, 0.5), "std": (0.2, 0.3, 0.4), "label_names": ("a", "b", "c", "d", "e", "f", "g")}
    )
    model = dynnet.cascade([small, large], input_sizes=[(3, 16, 16), (3, 32, 32)])
    assert model.class_names == tuple("abcdefg")
    raw = torch.rand(4, 3, 32, 32)

    def prepared(x: Tensor, model: nn.Module) -> Tensor:
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        return (x - mean) / std

    assert model.pretrained_cfg["mean"] == large.pretrained_cfg["mean"]
    outputs = model.forward_exits(prepared(raw, large)).logits
    torch.testing.assert_close(outputs[0], small(prepared(F.avg_pool2d(raw, 2), small)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1], large(prepared(raw, large)))


@torch.no_grad()
def test_the_same_model_at_two_sizes() -> None:
    once, x = alive(LARGE, 1), images()
    model = dynnet.cascade([once, once], input_sizes=[(3, 20, 20), (3, 32, 32)])
    small = F.interpolate(x, (20, 20), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.forward_exits(x).logits[0], once(small))
    assert all(check.kept for check in dynnet.verify(model, x).checks)


def test_all_verbs_take_a_cascade() -> None:
    x = images(40)
    loader = [(x, torch.randint(CLASSES, (40,), generator=torch.Generator().manual_seed(0)))]
    model = dynnet.cascade([alive(SMALL, 0), wrapped()])
    fitted = dynnet.calibrate(model, loader, budget=0.8)
    assert fitted.macs <= 0.8 * model.ledger().dense
    assert dynnet.measure(model, loader).macs_share == pytest.approx(fitted.macs / model.ledger().dense)
    timed = dynnet.latency(dynnet.fold(model), x, calls=2, warmup=0)
    assert timed.dense_ms.shape == (2,)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    outputs = model.train()(x)
    dynnet.loss(outputs, loader[0][1]).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "mean", "wrapped", "gated", "pruned"])
def test_a_file_holds_it(kind: str, tmp_path: Path) -> None:
    x, path = images(), tmp_path / "cascade.safetensors"
    if kind == "pruned":
        thin = dynnet.prune(alive(LARGE, 1), macs=0.5, criterion="l1", input_size=LARGE.size)
        model = dynnet.cascade([alive(SMALL, 0), thin])
    elif kind in ("wrapped", "gated"):
        combine = "mean" if kind == "wrapped" else "last"
        model = dynnet.cascade([alive(SMALL, 0), wrapped("channel" if kind == "gated" else None)], combine=combine)
    else:
        model = pair(combine="mean" if kind == "mean" else "last", input_sizes=[(3, 16, 16), (3, 32, 32)])
    leave_one_by_one(model, x)
    dynnet.save(model, path, CREATE, sparse=kind == "mean")
    again = dynnet.load(path)
    assert (again.exits, again.thresholds, again.config.input_size) == (
        model.exits,
        model.thresholds,
        model.config.input_size,
    )
    for mine, theirs in zip(again.predict(x), model.predict(x), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"members": []}, "none of 2 to 16 models"),
        ({"members": [1, 2]}, "none of 2 to 16 models"),
        ({"combine": "best"}, "combine"),
        ({"input_sizes": [[3, 32, 32]]}, "1 sizes for 2 members"),
        ({"input_sizes": [[3, 0, 32], [3, 32, 32]]}, "input_sizes"),
        ({"thresholds": [0.5, 0.5]}, "cannot stand in a row: got 2 thresholds"),
        ({"confidence": "of my own"}, "pass it as confidence="),
    ],
)
def test_a_file_that_cannot_be_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "cascade.safetensors"
    dynnet.save(pair(), path, CREATE)
    tensors, about = read_bundle(path)
    write_bundle(path, tensors, {**about, **change})
    with pytest.raises(CheckpointError, match=told):
        dynnet.load(path)
    write_bundle(path, {name: t for name, t in tensors.items() if "members.1.layer3" not in name}, about)
    with pytest.raises(CheckpointError, match="member 1"):
        dynnet.load(path)


def test_what_a_file_needs_to_know_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a cascade of 2 wants arguments for each member, in a list"):
        dynnet.save(pair(), tmp_path / "x", CREATE[0])
    with pytest.raises(CheckpointError, match="several are a cascade's"):
        dynnet.save(alive(LARGE, 1), tmp_path / "x", CREATE)
    dynnet.save(pair(), tmp_path / "x", CREATE)
    with pytest.raises(CheckpointError, match="has no backbone of one piece"):
        dynnet.load(tmp_path / "x", backbone=alive(LARGE, 1))


@torch.no_grad()
def test_it_can_be_taken_apart() -> None:
    small, large, x = alive(SMALL, 0), wrapped("channel"), images()
    one, other = members_of(dynnet.cascade([small, large]))
    assert torch.equal(one(x), small(x))
    assert isinstance(other, dynnet.DynamicModel)
    assert other.exits == large.exits
    for mine, theirs in zip(other.predict(x), large.predict(x), strict=True):
        assert torch.equal(mine, theirs)


def test_it_is_exported_as_stages_in_a_row(tmp_path: Path) -> None:
    x = images()
    model = dynnet.cascade([alive(SMALL, 0), wrapped()], input_sizes=[(3, 16, 16), (3, 32, 32)], combine="mean")
    leave_one_by_one(model, x)
    model.thresholds = [float("inf"), *model.thresholds[1:]]  # off, but joined later
    manifest = dynnet.export(model, tmp_path / "stages")
    assert len(manifest.stages) == 3
    assert manifest.dense_macs == model.ledger().dense
    mine, theirs = Runner(tmp_path / "stages", threads=1).predict(x.numpy()), model.predict(x)
    assert mine.exit.tolist() == theirs.exit.tolist()
    assert mine.macs.tolist() == theirs.macs.tolist()
    np.testing.assert_allclose(mine.logits, theirs.logits.numpy(), rtol=0, atol=1e-4)


def test_its_time_is_compared_with_the_last_members(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(model: dynnet.DynamicModel, sets: list[Any], **_: Any) -> Any:
        from dynnet.deploy.stage_times import Times

        asked.extend(sets)
        dense = np.array([10.0])  # the first member takes 2, and a stage 0.5
        leaving = {(True,): [[2.5], [13.0]], (False,): [[np.nan], [12.0]]}
        return {running: Times(dense, np.array(leaving[running])) for running in sets}

    monkeypatch.setattr("dynnet.deploy.stage_times.measure_times", measured)
    times = StageTimes.of(pair(), "onnxruntime", 1)
    assert asked == [(True,), (False,)]
    taken = np.array([0, 0, 0, 1])
    assert times.mean((True,), taken) == pytest.approx(2.5 + 0.25 * 10.5)
    assert times.mean((False,), np.ones(4, int)) == 12.0
    assert [(s.macs, s.head) for s in times.ledger().segments] == [(1_500_000, 1_000_000), (10_500_000, 0)]


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: dynnet.cascade([alive(LARGE, 1)]), "got one model; give two or more"),
        (lambda: dynnet.cascade(alive(LARGE, 1)), "got one model"),  # type: ignore[arg-type]
        (lambda: dynnet.cascade([]), "got no models"),
        (lambda: pair(combine="best"), "combine='best': choose from last, mean"),
        (lambda: pair(input_sizes=[(3, 32, 32)]), "got 1 input_sizes for 2 members"),
        (lambda: dynnet.cascade([pair(), alive(LARGE, 1)]), "member 0 is a cascade itself"),
        (lambda: dynnet.cascade([alive(SMALL, 0), alive(LARGE, 1).train()]), "member 1, .* is in train mode"),
        (lambda: dynnet.cascade([alive(SMALL, 0), wrapped().backbone]), "member 1 is the backbone of a wrapped model"),
        (
            lambda: dynnet.cascade([alive(LARGE, 1), few_classes()], input_sizes=[LARGE.size] * 2),
            r"\[7, 3\] classes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_stand_in_a_row_is_refused(build: Any, told: str) -> None:
    with pytest.raises(CascadeError, match=told):
        build()


def test_names_confidences_and_gates_must_agree() -> None:
    one, other = alive(SMALL, 0), alive(LARGE, 1)
    prepare_(one, {"label_names": tuple("abcdefg")})
    prepare_(other, {"label_names": tuple("abcdefh")})
    with pytest.raises(CascadeError, match="other names for their classes"):
        dynnet.cascade([one, other])
    sure = dynnet.wrap(alive(SMALL, 0), ["layer1"], input_size=SMALL.size, confidence="margin").eval()
    with pytest.raises(CascadeError, match="measure confidence by margin, max_probability"):
        dynnet.cascade([sure, wrapped()])
    assert dynnet.cascade([sure, wrapped()], confidence="margin").measure.name == "margin"
    fine = dynnet.wrap(alive(SMALL, 0), [], input_size=SMALL.size, gates=dynnet.GateConfig(unit=4)).eval()
    with pytest.raises(CascadeError, match="gated in different ways"):
        dynnet.cascade([fine, wrapped("channel")])


def test_images_of_another_size_are_refused_where_a_member_cannot_take_them() -> None:
    model = pair()
    with pytest.raises(InputError, match="expected float images"):
        model(torch.zeros(2, 1, 32, 32))
    with pytest.raises(DataError):
        dynnet.calibrate(model, [], budget=0.5)
