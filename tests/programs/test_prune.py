"""The pruning pipeline, as a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dynnet
from dynnet.backbone.dry_run import trace
from dynnet.deploy import Runner
from dynnet.files.bundles import read_bundle
from dynnet.learning.data import load_data
from dynnet.learning.recipes import read_recipe
from dynnet.pruning import choosing, sparsity
from training import cuts, pipeline, prune, train

RECIPE = """\
data: {name: digits, crop: 1}
backbone: {name: cifar_resnet20, kwargs: {width: 0.5}}
dense: {epochs: 1, batch_size: 64}
finetune: {epochs: 2, batch_size: 64, lr: 0.02}
pruning: {multiple: 1, batches: 2, recalibrate: 4}
checkpoint_steps: 4
"""
SIZE = (1, 8, 8)
VIT = "--backbone.kwargs={img_size: 8, patch_size: 4}"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A recipe, and weights that are good enough to be pruned."""
    out = tmp_path_factory.mktemp("prune")
    path = out / "recipe.yaml"
    path.write_text(RECIPE)
    argv = ["--recipe", str(path), "--out", str(out / "dense"), "--method", "l1", "--macs", "1.0"]
    assert prune.main([*argv, "--dense.epochs=6", "--finetune.epochs=0"]) == 0
    return path, str(out / "dense" / "backbone.safetensors")


def pruned(dense: tuple[Path, str], out: Path, *more: str) -> dict[str, Any]:
    recipe, weights = dense
    start = ["--dense.epochs=0", f"--backbone.weights={weights}"]
    assert prune.main(["--recipe", str(recipe), "--out", str(out), *start, *more]) == 0
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["kind"] == kind]


SLOW = [pytest.param(method, marks=pytest.mark.sweep) for method in ("fpgm", "hessian", "random")]


@pytest.mark.parametrize("method", ["l1", "taylor", "activation", "slimming", "scratch", *SLOW])
def test_channels_go_and_the_rest_learns(method: str, dense: tuple[Path, str], tmp_path: Path) -> None:
    # Half of them before the cut; and new weights have more to learn.
    more = ["--finetune.epochs=4"] if method in ("slimming", "scratch") else []
    results = pruned(dense, tmp_path / "run", "--method", method, "--macs", "0.5", *more)
    model = dynnet.load(tmp_path / "run" / "model.safetensors")
    whole = dynnet.load(tmp_path / "run" / "backbone.safetensors")
    share = trace(model, SIZE, 1).macs / trace(whole, SIZE, 1).macs
    assert 0.45 < share <= 0.5
    assert results["pruned"]["macs"] / results["dense"]["macs"] == pytest.approx(share)
    assert results["pruned"]["parameters"] < results["dense"]["parameters"]
    assert results["pruned"]["compression"] > 1
    cut = records(tmp_path / "run", "change")[-1]["accuracy"][0]
    tuned = records(tmp_path / "run", "epoch")[-1]["accuracy"][0]
    assert tuned > cut
    assert results["dense"]["accuracy"] > 0.8
    assert results["pruned"]["accuracy"] > 0.3
    if method == "slimming":
        assert [r["stage"] for r in records(tmp_path / "run", "epoch")] == ["slimming"] * 2 + ["finetune"] * 2


@pytest.mark.sweep
def test_the_norm_scales_shrink_while_slimming(dense: tuple[Path, str], tmp_path: Path) -> None:
    def scales(name: str, *more: str) -> float:
        out = tmp_path / name
        pruned(dense, out, "--method=slimming", "--macs=1.0", *more)
        tensors, _ = read_bundle(out / "model.safetensors")
        return float(sum(v.abs().sum() for k, v in tensors.items() if "bn" in k and k.endswith("weight")))

    assert scales("default") < 0.8 * scales("none", "--pruning.slimming=0")


@pytest.mark.parametrize("method", ["taylor", "l1"])
def test_what_is_looked_at_is_shuffled(
    method: str, dense: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many datasets lie in the order of their classes; the first batches would be of one."""
    seen: dict[str, list[int]] = {}

    def looking(name: str, call: Any) -> Any:
        def looked(model: Any, loader: Any = (), *args: Any, **kwargs: Any) -> Any:
            seen[name] = [row for batch in loader for row in batch.ids.tolist()]
            return call(model, loader, *args, **kwargs)

        return looked

    for name in ("prune", "recalibrate_"):
        monkeypatch.setattr(cuts, name, looking(name, getattr(cuts, name)))
    pruned(dense, tmp_path / "run", "--method", method)
    assert seen.keys() == {"prune", "recalibrate_"}
    assert all(len(rows) > 500 and rows != sorted(rows) for rows in seen.values())


def test_blocks_go(dense: tuple[Path, str], tmp_path: Path) -> None:
    results = pruned(dense, tmp_path / "run", "--method=layers", "--macs=0.7", "--pruning.steps=2")
    assert 0.5 < results["pruned"]["macs"] / results["dense"]["macs"] <= 0.7
    assert len(read_bundle(tmp_path / "run" / "model.safetensors")[1]["shape"]["removed"]) >= 2
    assert [r["stage"] for r in records(tmp_path / "run", "epoch")] == ["finetune"] * 2


def test_weights_go_step_by_step(dense: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = pruned(dense, out, "--method=magnitude", "--sparsity=0.8", "--pruning.steps=2")
    shares = [r["sparsity"] for r in records(out, "change")]
    assert shares == pytest.approx([0, 0.7, 0.8], abs=1e-3)
    assert results["pruned"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert results["pruned"]["compression"] > 2
    assert results["pruned"]["macs"] == results["dense"]["macs"]  # nothing is skipped
    assert sparsity(dynnet.load(out / "model.safetensors"))[""] == pytest.approx(0.8, abs=1e-3)


def test_every_layer_can_lose_the_same_share(dense: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    pruned(dense, out, "--method=magnitude", "--sparsity=0.5", "--pruning.scope=group", "--finetune.epochs=0")
    shares = sparsity(dynnet.load(out / "model.safetensors"))
    assert list(shares.values()) == pytest.approx([0.5] * len(shares), abs=1e-2)


def test_tickets_go_back_to_early_weights(dense: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ["--recipe", str(dense[0]), "--out", str(out), "--method=lottery", "--sparsity=0.5", "--finetune.epochs=0"]
    assert prune.main([*argv, "--dense.epochs=2", "--pruning.rewind=1"]) == 0
    early, last = read_bundle(out / "early.safetensors")[0], read_bundle(out / "backbone.safetensors")[0]
    ticket = read_bundle(out / "state.safetensors")[0]
    name = "layer2.1.conv1"
    mask = ticket[f"model.{name}.parametrizations.weight.0.mask"]
    assert torch.equal(ticket[f"model.{name}.parametrizations.weight.original"], early[f"{name}.weight"])
    kept, gone = last[f"{name}.weight"][mask].abs(), last[f"{name}.weight"][~mask].abs()
    assert kept.min() >= gone.max()
    assert not torch.equal(early[f"{name}.weight"], last[f"{name}.weight"])


@pytest.mark.sweep
def test_a_ticket_of_another_runs_dense_stage(
    dense: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--recipe", str(dense[0]), "--method=lottery", "--sparsity=0.5"]
    trained = [*argv, "--out", str(tmp_path / "one"), "--dense.epochs=2", "--pruning.rewind=1"]
    assert prune.main(trained) == 0
    reused = [
        *argv,
        "--dense.epochs=0",
        f"--backbone.weights={tmp_path / 'one' / 'backbone.safetensors'}",
        f"--pruning.early={tmp_path / 'one' / 'early.safetensors'}",
    ]
    assert prune.main([*reused, "--out", str(tmp_path / "two")]) == 0
    a, b = (read_bundle(tmp_path / name / "model.safetensors")[0] for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    wrong = [*reused[:-1], f"--pruning.early={tmp_path / 'one' / 'backbone.safetensors'}"]
    assert prune.main([*wrong, "--out", str(tmp_path / "three")]) == 2
    assert "holds a backbone, not the early weights of a dense stage" in capsys.readouterr().err


def test_two_of_four_weights_stay(dense: tuple[Path, str], tmp_path: Path) -> None:
    pruned(dense, tmp_path / "run", "--method=n:m")
    weight = dynnet.load(tmp_path / "run" / "model.safetensors").get_parameter("layer3.1.conv1.weight")
    assert bool(((weight.movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


def test_new_weights_do_not_depend_on_how_the_run_got_there(
    dense: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(dense, tmp_path / "a", "--method=scratch", "--finetune.epochs=0")
    keep = pipeline.Pipeline.keep

    def drawing(self: pipeline.Pipeline, model: torch.nn.Module) -> torch.nn.Module:
        torch.rand(1)
        return keep(self, model)

    monkeypatch.setattr(pipeline.Pipeline, "keep", drawing)
    pruned(dense, tmp_path / "b", "--method=scratch", "--finetune.epochs=0")
    a, b = (read_bundle(tmp_path / name / "model.safetensors")[0] for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.sweep
def test_the_dense_model_teaches(dense: tuple[Path, str], tmp_path: Path) -> None:
    alone, taught = (tmp_path / name for name in ("alone", "taught"))
    pruned(dense, alone, "--method=l1")
    pruned(dense, taught, "--method=l1", "--pruning.distill=0.9")
    whole = dynnet.load(alone / "backbone.safetensors")
    recipe = read_recipe(alone / "recipe.yaml")
    images = next(iter(load_data(recipe.data).loader("calibration", 512))).images

    def distance(out: Path) -> float:
        with torch.no_grad():
            return float((dynnet.load(out / "model.safetensors")(images) - whole(images)).square().mean())

    assert distance(taught) < distance(alone)


@pytest.mark.sweep
def test_an_int8_copy_comes_along(dense: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen, export = tmp_path / "run", list[int](), pipeline.export

    def looked(*args: Any, loader: Any = (), **kwargs: Any) -> Any:
        seen.extend(row for batch in loader for row in batch.ids.tolist())
        return export(*args, loader=loader, **kwargs)

    monkeypatch.setattr(pipeline, "export", looked)
    results = pruned(dense, out, "--method=l1", "--macs=0.6", "--pruning.int8=true")
    assert Runner(out / "int8").manifest.precision == "int8"
    assert len(seen) > 200
    assert seen != sorted(seen)  # shuffled, as what criteria look at
    assert results["engine"].startswith("onnxruntime ")
    assert results["int8"]["accuracy"] > results["pruned"]["accuracy"] - 0.02
    assert results["int8"]["macs"] == results["pruned"]["macs"]
    assert results["int8"]["size_bytes"] < results["pruned"]["size_bytes"]


@pytest.mark.sweep
def test_a_target_in_time(dense: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def share(model: Any, other: Any, size: tuple[int, int, int]) -> float:
        return trace(model, size, 1).macs / trace(other, size, 1).macs

    monkeypatch.setattr(choosing, "time_share", share)
    results = pruned(dense, tmp_path / "run", "--method=l1", "--pruning.latency=0.5", "--pruning.steps=2")
    assert 0.4 < results["pruned"]["macs"] / results["dense"]["macs"] <= 0.5


@pytest.mark.sweep
def test_exits_are_trained_on_what_is_left(
    dense: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(dense, tmp_path / "thin", "--method=l1", "--finetune.epochs=0")
    thin = tmp_path / "thin" / "model.safetensors"
    argv = ["--recipe", str(dense[0]), "--dense.epochs=0", "--wrap.exits=[layer1]", "--joint.epochs=2"]
    assert train.main([*argv, "--out", str(tmp_path / "whole"), f"--backbone.weights={thin}"]) == 0
    model = dynnet.load(tmp_path / "whole" / "model.safetensors")
    assert model.ledger().dense == trace(dynnet.load(thin), SIZE, 1).macs

    whole, steps = train.exit_losses, 0

    def mortal(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 10:
            raise Killed
        return whole(*args, **kwargs)

    monkeypatch.setattr(train, "exit_losses", mortal)
    with pytest.raises(Killed):
        train.main([*argv, "--out", str(tmp_path / "mortal"), f"--backbone.weights={thin}"])
    thin.unlink()  # the checkpoint knows its shape
    assert train.main(["--out", str(tmp_path / "mortal"), "--resume"]) == 0
    a, b = (read_bundle(tmp_path / name / "model.safetensors")[0] for name in ("whole", "mortal"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_nothing_is_trained_on_a_folded_copy(
    dense: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned(dense, tmp_path / "thin", "--method=l1", "--finetune.epochs=0")
    path = tmp_path / "folded.safetensors"
    model = dynnet.load(tmp_path / "thin" / "model.safetensors")
    dynnet.save(dynnet.fold(model, SIZE), path, read_bundle(tmp_path / "thin" / "model.safetensors")[1]["create"])
    argv = ["--recipe", str(dense[0]), "--out", str(tmp_path / "run"), f"--backbone.weights={path}"]
    assert prune.main(argv) == 2
    assert "is folded, for inference" in capsys.readouterr().err


class Killed(BaseException):
    """A process dies here."""


@pytest.mark.sweep
@pytest.mark.parametrize("method", [["--method=taylor", "--macs=0.4"], ["--method=magnitude", "--sparsity=0.9"]])
def test_a_run_that_dies_anywhere_ends_as_if_it_had_not(
    method: list[str], dense: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*method, "--pruning.steps=2"]
    expected = pruned(dense, tmp_path / "whole", *more)
    whole, steps, deaths = pipeline.F.cross_entropy, 0, {2, 20, 30, 31}

    def mortal(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in deaths:
            raise Killed
        return whole(*args, **kwargs)

    monkeypatch.setattr(pipeline.F, "cross_entropy", mortal)
    out = tmp_path / "mortal"
    for attempt in range(len(deaths) + 1):
        try:
            if attempt == 0:
                pruned(dense, out, *more)
            else:
                assert prune.main(["--out", str(out), "--resume"]) == 0
        except Killed:
            continue
    a, b = (read_bundle(tmp_path / name / "model.safetensors")[0] for name in ("whole", "mortal"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    got = json.loads((out / "results.json").read_text())
    assert got["pruned"]["accuracy"] == expected["pruned"]["accuracy"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method=l3"], "pruning.method='l3': choose from l1, l2, "),
        (["--method=l1", "--macs=0.001"], "macs=0.001 is out of reach"),
        (["--method=l1", "--pruning.steps=0"], "pruning.steps is 0; give a whole number"),
        (["--method=layers", "--pruning.latency=0.5"], "pruning has latency=0.5: 'layers' aims at macs; give one"),
        (["--method=magnitude", "--macs=0.3"], "pruning has macs=0.3: 'magnitude' aims at sparsity; give one"),
        (["--method=l1", "--macs=0.3", "--pruning.latency=0.5"], "'l1' aims at macs or latency; give one"),
        (["--method=n:m", "--sparsity=0.5"], "'n:m' has n and m in place of a target"),
        (["--method=n:m", "--pruning.steps=2"], "goes in one step"),
        (["--method=lottery", "--dense.epochs=0"], "lottery tickets go back to early weights"),
        (["--method=lottery", "--pruning.rewind=3"], "pruning.rewind=3"),
        (["--method=layers", "--macs=0.05"], "pruning.macs=0.05: without any of its blocks the model costs 0."),
        (["--method=layers", "--pruning.exclude=[fc]"], "pruning.exclude=['fc']: 'layers' takes whichever block"),
        (["--method=magnitude", "--sparsity=1.5"], "sparsity is 1.5; give a finite number"),
        (["--method=magnitude", "--pruning.exclude=[fd]"], "has no module 'fd'"),
        (["--method=n:m", "--pruning.m=7"], "multiple of m=7"),
        (["--method=l1", "--pruning.recalibrate=0"], "pruning.recalibrate is 0; give a whole"),
        (["--method=l1", "--pruning.distill=1.7"], "pruning.distill is 1.7; give a finite"),
        (["--method=slimming", "--finetune.epochs=1"], "'slimming' trains before and after its cut"),
        (["--method=slimming", "--backbone.name=test_vit", VIT], "scales of batch norms, and there are none"),
        (["--pruning.metod=l1"], "unknown key 'pruning.metod'; did you mean 'pruning.method'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(
    more: list[str], message: str, dense: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune.main(["--recipe", str(dense[0]), "--out", str(tmp_path / "run"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
