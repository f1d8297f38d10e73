"""The evaluation programs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser

import dynnet
from dynnet.errors import InputError
from dynnet.evaluation.tables import classifiers, operating_line, read_table
from dynnet.files import bundles as bundle
from dynnet.gates.plan import GatePlan, Region
from dynnet.learning.data import load_data
from dynnet.learning.recipes import read_recipe, recipe_to_yaml
from eval import play, report, speed
from eval.results import gate_use
from eval.static import beside
from tests.cases import FEW, leave_one_by_one, tiny

SIZE = (1, 8, 8)


@pytest.fixture(scope="module")
def reported(run: Path) -> Path:
    report.main(run, latency_samples=40)
    return run / "report"


def test_the_table_tells_what_each_input_got(reported: Path, run: Path) -> None:
    table = read_table(reported / "table.csv")
    results = json.loads((reported / "results.json").read_text())
    assert len(table["id"]) == results["test_images"] == 359
    assert classifiers(table) == 3
    assert (table["flops"] == 2 * table["macs"]).all()
    assert ((table["prediction"] == table["label"]) == table["correct"]).all()
    every = np.arange(359)
    for column in ("prediction", "correct"):
        stacked = np.stack([table[f"{column}_{e}"] for e in range(3)], 1)
        assert (stacked[every, table["exit"]] == table[column]).all()
    assert results["accuracy"] == pytest.approx(table["correct"].mean())
    assert results["macs_share"] == pytest.approx(table["macs"].mean() / results["dense_macs"])
    timed = ~np.isnan(table["latency_ms"])
    assert timed.sum() == 40
    assert (table["latency_ms"][timed] > 0).all()
    # The thresholds are those that were fitted on the calibration split.
    model = dynnet.load(run / "model.safetensors")
    assert [float(t) for t in results["thresholds"]] == list(model.thresholds)


def test_the_page_stands_alone(reported: Path) -> None:
    page = (reported / "index.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 8
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "MMAC" in page
    assert "MFLOP" in page
    assert len(list(reported.glob("*.png"))) == 8


def test_what_a_browser_computes_is_what_measure_says(reported: Path, run: Path, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((reported / "index.html").as_uri())
    model, data = dynnet.load(run / "model.safetensors"), load_data(read_recipe(run / "recipe.yaml").data)
    images = data.loader("test", 256)

    def seen(id: str) -> float:
        return float(page.locator(f"#{id}").get_attribute("data-value") or "nan")

    saved = dynnet.measure(model, images)
    assert seen("play-accuracy") == pytest.approx(saved.accuracy, abs=1e-12)
    assert seen("play-macs") == pytest.approx(saved.macs.mean(), rel=1e-12)
    positions = [*[("play-joint", str(at)) for at in (0, 2, 5)], ("play-exit-0", "120"), ("play-exit-1", "0")]
    for slider, position in positions:
        page.locator(f"#{slider}").fill(position)
        code = page.locator("#play-code").inner_text()
        model.thresholds = eval(code.removeprefix("model.thresholds = "), {"float": float})
        found = dynnet.measure(model, images)
        assert seen("play-accuracy") == pytest.approx(found.accuracy, abs=1e-12), code
        assert seen("play-macs") == pytest.approx(found.macs.mean(), rel=1e-12), code
        left = page.locator("#play-bars .share").all_inner_texts()
        assert [float(text.split("%")[0]) for text in left] == [round(100 * rate, 1) for rate in found.rates]
    assert len(set(model.thresholds)) > 1
    # One class alone.
    page.locator("#play-class").select_option("3")
    of_class = saved.answers.labels == 3
    assert seen("play-accuracy") == pytest.approx(found.correct[of_class].mean(), abs=1e-12)
    page.locator("#play-class").select_option("-1")
    # By keyboard, and as quickly as a hand moves.
    page.locator("#play-joint").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "play-joint"
    move = (
        "(() => { const t = performance.now(); dynnet.set(dynnet.state.thresholds); return performance.now() - t; })()"
    )
    assert page.evaluate(move) < 1000
    for width, scheme in ((390, "dark"), (1280, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors
    page.close()


def test_without_javascript_the_figures_are_there(reported: Path, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((reported / "index.html").as_uri())
    assert not page.locator("#play").is_visible()
    assert page.get_by_alt_text("Accuracy against mean MACs: exits, thresholds and the bare backbone").is_visible()
    context.close()


def test_a_page_of_many_inputs_has_some_of_them_and_says_so(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, results = read_table(reported / "table.csv"), report.read_report(reported / "results.json")
    shown = play.read_pictures(reported / report.PICTURES)
    assert 30 <= len(shown) <= 120
    monkeypatch.setattr(play, "MOST", 200)
    some = play.playground(table, results, shown)
    assert some["of"] == 359
    assert 150 <= some["images"] <= 200
    text = report.page(results, reported, [path.stem for path in reported.glob("*.png")], some)
    assert f"{some['images']} of the 359 test inputs, drawn at random" in " ".join(text.split())
    assert json.loads(some["data"].replace("<\\/", "</"))["images"] == some["images"]


@pytest.mark.parametrize(
    ("goal", "value", "told"),
    [
        ("budget", 0.5, "held-out images for a budget of 50% of the MACs."),
        ("accuracy_drop", 0.005, "an accuracy drop of at most 0.5 points."),
        ("risk", 0.01, "a risk of at most 1%."),
        ("latency", 0.4, "40% of the bare backbone&#39;s mean time in onnxruntime 1.2, in batches of 8."),
    ],
)
def test_the_page_says_what_thresholds_are_for(goal: str, value: float, told: str, reported: Path) -> None:
    results = report.read_report(reported / "results.json")
    clocked = {"engine": "onnxruntime 1.2", "batch_size": 8} if goal == "latency" else None
    results["calibration"] = {
        **results["calibration"],
        "goal": goal,
        "value": value,
        "clocked": clocked,
        "needed": None,
    }
    results["thresholds"] = [0.5, "inf"]
    text = " ".join(report.page(results, reported, [path.stem for path in reported.glob("*.png")]).split())
    assert told.replace("&#39;", "'") in text.replace("&#39;", "'")
    assert f"Switched off, as its head costs more than it saves: {results['exits'][1]}." in text


def test_figures_are_redrawn_from_the_table_alone(reported: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "report"
    copy.mkdir()
    for name in ("table.csv", "results.json", "easiest.png", "hardest.png", "overthought.png"):
        (copy / name).write_bytes((reported / name).read_bytes())
    report.main(tmp_path, redraw=True)
    for name in ("trade_off", "exits_taken", "latency_by_exit", "compute_by_class", "in_engine"):
        assert (copy / f"{name}.png").read_bytes() == (reported / f"{name}.png").read_bytes()


def test_a_report_shows_what_gates_do_and_what_deciding_is_worth(gated_run: Path) -> None:
    report.main(gated_run, latency_samples=20, engine=None)
    table = read_table(gated_run / "report" / "table.csv")
    results = json.loads((gated_run / "report" / "results.json").read_text())
    model = dynnet.load(gated_run / "model.safetensors")
    gates, regions = results["gates"], model.gates.plan.regions
    assert [g["layer"] for g in gates["regions"]] == [region.layer for region in regions]
    for g in gates["regions"]:
        here = table[f"open:{g['layer']}"]
        assert (~np.isnan(here)).sum() == g["images"]
        assert np.nanmean(here) == pytest.approx(g["open"])
        assert 0 <= g["differ"] <= 0.5
        assert g["masks"] >= 1
    assert gates["frozen_accuracy"] == pytest.approx(table["frozen_correct"].mean())
    assert gates["frozen_macs_share"] == pytest.approx(table["frozen_macs"].mean() / results["dense_macs"])
    assert results["macs_share"] < 1
    assert results["accuracy"] == pytest.approx(table["correct"].mean())
    page = (gated_run / "report" / "index.html").read_text()
    assert "frozen at their mean decision" in page
    assert ("Exit by exit" in page) == bool(model.exits)
    assert page.count('<img src="data:image/png;base64,') == (8 if model.exits else 6)


def test_gate_use_counts_units_and_masks() -> None:
    region = Region("layer", (2, 2), inputs=8)
    masks = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 1]], dtype=bool)
    assert gate_use([masks], GatePlan((region,), (), 0.5)) == [
        {
            "layer": "layer",
            "units": 4,
            "images": 4,
            "open": 0.5,
            "dead": 0.25,
            "always": 0.25,
            "differ": 0.25,
            "masks": 4,
        }
    ]


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(tmp_path)
    assert "holds no finished run: recipe.yaml is missing; train one with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(tmp_path, redraw=True)
    assert "no table to draw from" in capsys.readouterr().err


def test_latency_times_both_models_on_the_same_inputs() -> None:
    case = FEW[0]
    model, images = case.wrapped(), case.images(6)
    expected = leave_one_by_one(model, images)
    timed = dynnet.latency(model, images, warmup=1)
    assert sorted(timed.rows[:, 0].tolist()) == list(range(6))
    assert (timed.exits[:, 0] == expected.numpy()[timed.rows[:, 0]]).all()
    assert {e: n for e, (n, _) in timed.by_exit().items()} == {e: int((expected == e).sum()) for e in range(3)}
    summary = timed.summary()
    assert summary["uncertain"] == ["p90", "p99"]
    assert summary["speedup"] == pytest.approx(timed.dense_ms.sum() / timed.dynamic_ms.sum())
    batches = dynnet.latency(model, images, batch_size=4, calls=5, warmup=0)
    assert batches.exits.shape == (5, 4)
    with pytest.raises(InputError, match="needs batch size 1, this was taken at 4"):
        batches.by_exit()
    with pytest.raises(InputError, match="got 6 images for batches of 7"):
        dynnet.latency(model, images, batch_size=7)
    assert model.exits  # still wrapped
    assert len(model.predict(images).exit.unique()) == 3


def test_measure_prints_macs_and_flops() -> None:
    model = dynnet.wrap(tiny(), ["0"], input_size=(3, 32, 32))
    model.thresholds = [-float("inf")]
    text = str(dynnet.measure(model, [(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))]))
    assert "MMAC" in text
    assert "MFLOP" in text
    assert "0: 100.0% left here" in text


def test_speed_compares_with_the_bare_and_the_cut_backbone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    speed.main("cifar_resnet20", unit=4, batch=[1, 2], calls=1, macs=0.5, out=tmp_path / "speed.json")
    found = json.loads((tmp_path / "speed.json").read_text())
    variants = ["dense", "masked", "sparse", "cut for good", "pruned", "90% zeros"]
    assert [(f["batch"], f["variant"]) for f in found] == [(size, variant) for size in (1, 2) for variant in variants]
    assert found[0]["speedup"] == 1
    shares = {f["variant"]: f["macs_share"] for f in found}
    assert [shares[name] for name in ("dense", "masked", "90% zeros")] == [1, 1, 1]
    assert [shares[name] for name in ("sparse", "cut for good", "pruned")] == pytest.approx([0.5] * 3, abs=0.1)
    assert "cifar_resnet20: 98% of the MACs under gates" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        speed.main("resnet5O")
    assert "timm has no model 'resnet5O'; did you mean 'resnet50'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed.main("cifar_resnet20", keep=1.5)
    assert "keep=1.5" in capsys.readouterr().err


def test_pruned_backbones_stand_beside(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    report.main(copied, latency_samples=5, engine=None)
    results = json.loads((copied / "report" / "results.json").read_text())
    same = {key: results[key] for key in ("model", "backbone_kwargs", "dataset", "test_images")}
    macs = results["dense_macs"]
    backbone = dynnet.load(run / "backbone.safetensors")
    create = bundle.read_bundle(run / "backbone.safetensors")[1]["create"]
    for name, share, accuracy in (("thin", 0.5, 0.2), ("wide", 1.0, 1.0)):
        (tmp_path / name).mkdir()
        left = dynnet.prune(backbone, macs=share, criterion="l1", multiple=1, input_size=SIZE)
        dynnet.save(left, tmp_path / name / "model.safetensors", create)
        row = {"accuracy": accuracy, "macs": share * macs, "sparsity": 0.0, "size_bytes": 1000}
        found = {"pruned": row, "pruning": {"method": "l1", "steps": 1, "distill": 0.0}, "epochs": 3}
        if name == "thin":
            found["int8"] = {**row, "accuracy": 0.1}
            (tmp_path / name / "int8").mkdir()  # stages, which do not run in PyTorch
        (tmp_path / name / "results.json").write_text(json.dumps(same | found))
        # The second was pruned from the first.
        more = [f"--backbone.weights={tmp_path / 'thin' / 'model.safetensors'}"] if name == "wide" else []
        (tmp_path / name / "recipe.yaml").write_text(recipe_to_yaml(read_recipe(run / "recipe.yaml", more)))
    shutil.copytree(run, tmp_path / "two")
    (tmp_path / "two" / "report").mkdir(exist_ok=True)
    recipe = read_recipe(run / "recipe.yaml", [f"--backbone.weights={tmp_path / 'thin' / 'model.safetensors'}"])
    (tmp_path / "two" / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    hybrid = {"accuracy": 0.15, "mean_macs": 0.3 * macs, "dense_macs": 0.5 * macs, "epochs": 2}
    (tmp_path / "two" / "report" / "results.json").write_text(json.dumps(same | hybrid))
    shutil.copy(copied / "report" / "table.csv", tmp_path / "two" / "report")
    (tmp_path / "tomorrow").mkdir()
    report.main(copied, redraw=True, static=str(tmp_path / "[tw]*"), latency_samples=5, engine=None)
    assert re.search("left out, as not finished: .*tomorrow", capsys.readouterr().out)
    results = json.loads((copied / "report" / "results.json").read_text())
    wide, thin, two, small = results["static"]
    assert (wide["name"], wide["macs_share"], thin["macs_share"]) == ("wide", 1.0, 0.5)
    assert (two["method"], two["macs_share"]) == ("dynamic on a pruned backbone", pytest.approx(0.3))
    assert thin["line"] == []
    line = operating_line(read_table(copied / "report" / "table.csv"))
    assert pytest.approx(np.array([line[0] / macs, line[1]])) == np.array(two["line"]).T
    assert (thin["epochs"], wide["epochs"], two["epochs"]) == (3, 3 + 3, 2 + 3)  # with those of their backbones
    assert small["method"] == "l1 + int8"
    assert all(row["p50_ms"] > 0 and row["speedup"] > 0 for row in results["static"] if row is not small)
    assert small["p50_ms"] is None  # it is exported, and has its time there
    assert wide["dynamic_macs_share"] is None  # never as accurate as that
    assert thin["dynamic_macs_share"] is None or 0 < thin["dynamic_macs_share"] <= 1.2
    assert "l1<small>thin</small>" in (copied / "report" / "index.html").read_text()
    assert (copied / "report" / "beside_pruned.png").is_file()

    (tmp_path / "thin" / "results.json").write_text(json.dumps(same | {"model": "resnet18"}))
    (tmp_path / "unfinished").mkdir()
    for pattern, message in (
        ("nothing*", "no folder matches"),
        ("thin", "is of model='resnet18'"),
        ("un*", "not finished: .*unfinished"),
    ):
        with pytest.raises(SystemExit):
            report.main(copied, redraw=True, static=str(tmp_path / pattern))
        assert re.search(message, capsys.readouterr().err)


def test_equal_compute_and_equal_accuracy_are_read_off_the_line() -> None:
    points = {0: (0.4, 0.5), 1: (0.6, 0.7), 2: (0.9, 0.9)}
    table = {"dense_macs": np.full(10, 100)}
    for k, (share, accuracy) in points.items():
        table[f"point{k}_macs"] = np.full(10, 100 * share)
        table[f"point{k}_correct"] = (np.arange(10) < 10 * accuracy).astype(int)
    rows = [{"macs_share": 0.5, "accuracy": 0.8}, {"macs_share": 0.2, "accuracy": 0.95}]
    between, outside = beside(rows, table)
    assert between["dynamic_accuracy"] == pytest.approx(0.6)
    assert between["dynamic_macs_share"] == pytest.approx(0.75)
    assert outside["dynamic_accuracy"] is None
    assert outside["dynamic_macs_share"] is None
