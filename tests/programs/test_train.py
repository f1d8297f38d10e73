"""The training program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

import dynnet
from dynnet.errors import CheckpointError
from dynnet.files import bundles as bundle
from dynnet.learning.data import load_data
from dynnet.learning.processes import World
from dynnet.learning.recipes import read_recipe
from eval.runs import open_run
from training import loop, train
from training.tools import make_tools


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_everything_behind(run: Path, recipe: Path) -> None:
    records = log(run)
    assert {r["stage"] for r in records if r["kind"] == "epoch"} == {"dense", "heads", "joint"}
    dense = [r["losses"][-1] for r in records if r["kind"] == "step" and r["stage"] == "dense"]
    assert dense[-1] < 0.8 * dense[0]
    assert records[-1]["kind"] == "calibration"
    assert read_recipe(run / "recipe.yaml") == read_recipe(recipe)
    model = dynnet.load(run / "model.safetensors")
    assert model.class_names == tuple("0123456789")
    prepared = resolve_model_data_config(dynnet.load(run / "backbone.safetensors"))
    assert (prepared["input_size"], prepared["mean"], prepared["crop_pct"]) == ((1, 8, 8), (0.5,), 1.0)
    assert model.calibration is not None
    assert model.calibration["samples"] == round(1438 * 0.15)


GATED = """
data: {name: digits, crop: 1, calibration: 0.2, test: 0.2}
backbone: {name: cifar_resnet20}
wrap: {exits: %s, gates: {unit: 4, blocks: 1}}
budget: {target: %s}
dense: {epochs: 3, lr: 0.1, batch_size: 64}
heads: {epochs: 1, lr: 0.1, batch_size: 64}
joint: {epochs: 7, lr: 0.1, batch_size: 64}
calibration: {budget: 0.6}
log_steps: 5
"""


@pytest.mark.parametrize(("exits", "target"), [pytest.param("[]", 0.7, marks=pytest.mark.sweep), ("[layer2.0]", 0.5)])
def test_gates_learn_to_keep_a_budget(exits: str, target: float, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(GATED % (exits, target))
    assert train.main(["--recipe", str(path), "--out", str(out)]) == 0
    steps = [r for r in log(out) if r["kind"] == "step" and r["stage"] == "joint"]
    assert steps[-1]["expected_macs"] == pytest.approx(target, abs=0.1)
    rates = steps[-1]["open"]
    assert min(rates) < 0.9
    assert max(rates) > 0.1
    last = [r for r in log(out) if r["kind"] == "epoch"][-1]
    assert last["accuracy"][-1] > 0.85
    model = dynnet.load(out / "model.safetensors")
    data = load_data(read_recipe(path).data)
    measured = dynnet.measure(model, data.loader("test", 64))
    assert measured.macs_share < target + 0.15
    # The log tells of the calibration split what can be counted there again.
    masks = dynnet.measure(model, data.loader("calibration", 64)).answers.masks
    for key, expected in (
        ("open", [mask.mean() for mask in masks]),
        ("dead", [(~mask.any(0)).mean() for mask in masks]),
        ("always", [mask.all(0).mean() for mask in masks]),
    ):
        assert last[key] == pytest.approx(expected)
    assert last["macs"] < 1
    images = next(iter(data.loader("test", 64))).images
    decisions = model.forward_exits(images).decisions
    assert any(len(taken.decisions.unique(dim=0)) > 1 for taken in decisions.taken.values())


def test_gates_do_not_decay(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for decay_norms in ("true", "false"):
        path.write_text((GATED % ("[layer2.0]", 0.5)).replace("joint: {", "joint: {decay_norms: " + decay_norms + ", "))
        recipe = read_recipe(path)
        data = load_data(recipe.data)
        model = dynnet.wrap(timm.create_model("cifar_resnet20", in_chans=1), ["layer2.0"], gates="channel")
        optimizer = make_tools(model, recipe.joint, "joint", recipe, data, World(0, 1, torch.device("cpu"))).optimizer
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert all(decays[id(p)] == 0 for p in model.gates.parameters())
        assert decays[id(model.backbone.conv1.weight)] > 0


def test_the_heads_stage_leaves_the_backbone_alone(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train.main(["--recipe", str(recipe), "--out", str(out), "--joint.epochs", "0", "--ema=null"]) == 0
    dense, _ = bundle.read_bundle(out / "backbone.safetensors")
    model = dynnet.load(out / "model.safetensors")
    assert all(torch.equal(v, dense[k]) for k, v in model.backbone.state_dict().items())


def test_a_backbone_may_be_trained_alone(
    recipe: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plain"
    argv = ["--recipe", str(recipe), "--out", str(out), "--wrap.exits", "[]", "--heads.epochs=0", "--joint.epochs=0"]
    assert train.main(argv) == 0
    model = dynnet.load(out / "model.safetensors")
    assert not isinstance(model, dynnet.DynamicModel)
    expected, _ = bundle.read_bundle(run / "backbone.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"plain' decides nothing by the input; show it beside one that does"):
        open_run(out)


def test_bfloat16_is_left_out_where_the_processor_has_none(
    recipe: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "computes_bfloat16", lambda device: False)
    argv = ["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--amp", "true"]
    assert train.main([*argv, "--heads.epochs", "0", "--joint.epochs", "0"]) == 0
    assert "dense: in float32; this processor has no instructions for bfloat16" in capsys.readouterr().out
    expected, got = (bundle.read_bundle(at / "backbone.safetensors")[0] for at in (run, tmp_path / "run"))
    assert all(torch.equal(expected[key], got[key]) for key in expected)


class Killed(BaseException):
    """A process dies here."""


def test_a_run_that_dies_anywhere_ends_as_if_it_had_not(
    run: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mortal"
    argv = ["--recipe", str(recipe), "--out", str(out)]
    whole = train.exit_losses
    steps = 0

    def mortal(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps in deaths:
            raise Killed
        return whole(*args, **kwargs)

    monkeypatch.setattr(train, "exit_losses", mortal)
    # At once, in the middle of each stage, just after a checkpoint, and twice in a row.
    deaths = {1, 10, 11, 25, 45, 70, 85}
    for attempt in range(len(deaths) + 1):
        try:
            assert train.main(argv if attempt == 0 else ["--out", str(out), "--resume"]) == 0
        except Killed:
            continue
    for name in ("model", "backbone", "state"):
        expected, about = bundle.read_bundle(run / f"{name}.safetensors")
        got, other = bundle.read_bundle(out / f"{name}.safetensors")
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) for k in expected)
        if name == "model":
            assert about == other

    # The log has every line once.
    def lines(path: Path) -> list[dict]:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in log(path)]

    assert lines(out) == lines(run)


@pytest.mark.sweep
def test_two_processes_give_the_losses_of_one(recipe: Path, tmp_path: Path) -> None:
    few = ["--recipe", str(recipe), "--mixup=0", "--dense.epochs=1", "--joint.epochs=1", "--log_steps=1"]
    # Training amplifies rounding, the more the larger its steps; test_distributed.py looks at one step in double.
    few += ["--dense.lr=0.01", "--heads.lr=0.01", "--joint.lr=0.01"]
    assert train.main([*few, "--out", str(tmp_path / "one")]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "training.train", *few, "--out", str(tmp_path / "two")],
        check=True, capture_output=True, env=environment,
    )  # fmt: skip
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [r["kind"] for r in one] == [r["kind"] for r in two]
    for a, b in zip(one, two, strict=True):
        if a["kind"] == "step":
            assert b["losses"] == pytest.approx(a["losses"], rel=5e-3), (a["stage"], a["step"])
        if a["kind"] == "epoch":  # every image once, whoever looked at it
            count = round(1438 * 0.15)
            assert all(abs(x * count - round(x * count)) < 1e-6 for x in b["accuracy"])


def test_a_non_finite_loss_says_where_and_keeps_the_last_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main(["--recipe", str(recipe), "--out", str(out), "--joint.lr=1e6"]) == 2
    message = capsys.readouterr().err
    assert "error: the loss is" in message
    assert "in stage 'joint', epoch 1, step " in message
    assert "lower joint.lr" in message
    assert train.State.read(out / "state.safetensors").position.stage == 2
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "{run}", "--recipe", "{recipe}"], "holds a run already; go on with --resume, or choose another"),
        (["--out", "{tmp}", "--resume"], "nothing to resume in .*: it holds no state.safetensors"),
        (["--out", "{run}", "--resume", "--joint.epochs=9"], "--resume goes on with .*; leave out"),
        (["--out", "{tmp}/x", "--recipe", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--joint.epoch=9"],
            "unknown key 'joint.epoch'; did you mean",
        ),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--data.name=", "--data", "/no"], "no data folder '/no'"),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--backbone.name=resnet5"],
            "timm has no model 'resnet5'; did you",
        ),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--backbone.weights=/no"], "cannot read weights '/no'"),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--wrap.exits=[layer9]"], "no boundary 'layer9'"),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--calibration.budget=1", "--calibration.accuracy_drop=0.1"],
            "give one of budget, latency, accuracy_drop and risk",
        ),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--calibration.budget=0.01"], "a budget of 0.01 .* costs 0."),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--joint.batch_size=5000"], "batch size 5000 exceeds the 1222"),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--joint.batch_size=63"],
            "mixup pairs images: joint.batch_size=63",
        ),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--joint.opt=sgdd"], "joint.opt='sgdd': timm has no such"),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--joint.opt=lamb"],
            "'joint' cannot be run",
        ),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--joint.opt=adahessian"],
            "'joint' cannot be run",
        ),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--backbone.kwargs={{widht: 2}}"], "timm cannot create"),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--checkpoint_steps=0"], "checkpoint_steps is 0; give a whole"),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--wrap.exits=0"], "names no exits and there are no gates"),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--budget.ramp=2"], "budget.ramp is 2.0; give a finite"),
        (["--out", "{tmp}/x", "--recipe", "{recipe}", "--budget.sharpness=0"], "budget.sharpness is 0.0; give a"),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--wrap.gates={{}}", "--budget.target=0.1"],
            "budget.target: a budget of",
        ),
        (
            ["--out", "{tmp}/x", "--recipe", "{recipe}", "--wrap.gates={{}}", "--joint.epochs=0"],
            "joint.epochs=0: gates learn in the joint stage",
        ),
    ],
)
def test_bad_commands_are_explained_and_overwrite_nothing(
    argv: list[str], message: str, run: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    filled = [a.format(run=run, recipe=recipe, tmp=tmp_path) for a in argv]
    assert train.main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    assert not (tmp_path / "x" / "state.safetensors").exists()


def test_weights_of_a_file_are_taken(run: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = [
        f"--backbone.weights={run / 'backbone.safetensors'}",
        "--dense.epochs=0",
        "--heads.epochs=0",
        "--joint.epochs=0",
    ]
    assert train.main(["--recipe", str(recipe), "--out", str(out), *more]) == 0
    a, _ = bundle.read_bundle(run / "backbone.safetensors")
    b, _ = bundle.read_bundle(out / "backbone.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_classifier_for_other_classes_begins_anew(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = timm.create_model("cifar_resnet20", num_classes=7, in_chans=1, width=0.25)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    out = tmp_path / "run"
    stages = ["--dense.epochs=0", "--heads.epochs=0", "--joint.epochs=0"]
    argv = ["--recipe", str(recipe), "--out", str(out), f"--backbone.weights={tmp_path / 'other.safetensors'}"]
    assert train.main([*argv, *stages]) == 0
    assert "'fc' begins anew: that of the file is for 7 classes, here are 10" in capsys.readouterr().out
    taken, _ = bundle.read_bundle(out / "backbone.safetensors")
    assert taken["fc.weight"].shape[0] == 10
    assert all(torch.equal(taken[key], value) for key, value in other.state_dict().items() if not key.startswith("fc."))


def test_help_lists_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert "--joint.epochs" in text
    assert "--resume" in text
