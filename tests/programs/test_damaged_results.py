"""Results that chance has damaged are read as results, or refused in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynnet.errors import CheckpointError
from eval.cards import card, read_shown
from eval.report import page
from eval.saved import LARGEST, read_report
from eval.static import read_static
from tests.programs.damage import alter

REPORTS = json.loads((Path(__file__).parent / "reports.json").read_text())  # of eval.report, with exits and with gates
ROW = {
    "name": "thin", "method": "l1", "accuracy": 0.9, "macs_share": 0.5, "sparsity": 0.0, "size_bytes": 1000,
    "epochs": 3, "dynamic": False, "p50_ms": 1.0, "speedup": 1.5, "dynamic_accuracy": None, "dynamic_macs_share": 0.5,
}  # fmt: skip
REPORTS[0] |= {"static": [ROW], "static_timing": {"p50_ms": 1.0, "speedup": 1.2, "dense_ms": 1.3}, "epochs": 3}
OTHER = {"name": "thin", "method": "l1", "accuracy": 0.9, "epochs": 3, "dynamic": False, "ms": 0.5}
REPORTS[0]["engine"] = {
    "engine": "onnxruntime 1.0", "threads": 1, "calls": 300, "dense_ms": 1.0, "ms": 0.7,
    "leaving_ms": [0.5] * (len(REPORTS[0]["exits"]) + 1), "switched_off": ["layer1"], "static": [OTHER],
    "left_out": ["small: int8"], "notes": ["gates save nothing"],
}  # fmt: skip
SUBJECT = {key: REPORTS[0][key] for key in ("model", "backbone_kwargs", "dataset", "test_images")}
MEASURED = {"accuracy": 0.9, "macs": 10**6, "sparsity": 0.0, "size_bytes": 1000}
SETTINGS = {"method": "l1", "steps": 2, "distill": 0.5}
PRUNED = {**SUBJECT, "pruning": SETTINGS, "epochs": 3, "pruned": MEASURED, "int8": MEASURED}
DRAWN = ["trade_off", "exits_taken", "latency_by_exit", "compute_by_class", "gate_map", "beside_pruned", "in_engine"]
FIGURES = [*DRAWN, "easiest", "hardest", "overthought"]


def damaged(whole: dict[str, Any], chance: random.Random) -> str:
    """Results as text, after some accidents."""
    text = json.dumps(alter(whole, chance))
    if chance.random() < 0.3:
        at = chance.randrange(len(text))
        text = chance.choice(
            [text[:at], text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :], text[:at] + "[" + text[at:]]
        )
    return text


def tried(whole: list[dict[str, Any]], file: Path, read: Callable[[], object], count: int) -> None:
    """Many damaged files are read; each gives what is wanted or an error that names it."""
    told = []
    for seed in range(count):
        chance = random.Random(seed)
        file.write_text(damaged(chance.choice(whole), chance))
        try:
            read()
        except CheckpointError as error:
            told.append(str(error))
    assert count / 5 < len(told) < count
    assert all(str(file.parent) in one and len(one) < 600 for one in told)


def test_damaged_results_of_a_report_are_drawn_or_refused_in_words(tmp_path: Path) -> None:
    for name in FIGURES:
        (tmp_path / f"{name}.png").touch()
    file = tmp_path / "results.json"
    for whole in REPORTS:
        file.write_text(json.dumps(whole))
        assert whole["model"] in page(read_report(file), tmp_path, FIGURES)
    tried(REPORTS, file, lambda: page(read_report(file), tmp_path, FIGURES), 300)


def test_damaged_results_of_pruning_stand_beside_or_are_refused_in_words(tmp_path: Path) -> None:
    run = tmp_path / "thin"
    run.mkdir()
    (run / "recipe.yaml").touch()
    (run / "results.json").write_text(json.dumps(PRUNED))
    assert [row["method"] for row in read_static(str(run), REPORTS[0])] == [
        "l1 in 2 steps + distillation",
        "l1 in 2 steps + distillation + int8",
    ]
    tried([PRUNED], run / "results.json", lambda: read_static(str(run), REPORTS[0]), 300)


def test_damaged_results_of_a_card_make_one_or_are_refused_in_words(tmp_path: Path) -> None:
    zoo = [json.loads(path.read_text()) for path in sorted(Path("models").glob("*/results.json"))]
    file = tmp_path / "results.json"
    tried(zoo, file, lambda: card(read_shown(file)), 300)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged: it is no JSON: Expecting value"),
        ("[1]", "holds no keys and values"),
        ("[" * 100_000, "is damaged: .*recursion"),
        ('{"a": ' * 30 + "1" + "}" * 30, "more than 20 mappings and lists within each other"),
        ('{"a": ' + "9" * 5000 + "}", "is damaged: it is no JSON: Exceeds the limit"),
        ("{}" + " " * LARGEST, "has more than 10000000 bytes"),
        ("{}", "lacks 'model'"),
        (json.dumps({**REPORTS[0], "accuracy": "high"}), "accuracy is 'high'; expected a number"),
        (json.dumps({**REPORTS[0], "thresholds": [1.0]}), "thresholds has 1 entries for 4 exits"),
        (json.dumps({**REPORTS[0], "dense_macs": 0}), "what it was compared with costs nothing"),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"results.json' .*{message}"):
        read_report(tmp_path / "results.json")


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read '.*results\.json': No such file"):
        read_report(tmp_path / "results.json")
    with pytest.raises(CheckpointError, match=r"has no easiest\.png; write the report anew"):
        page(REPORTS[0], tmp_path, ["easiest"])


def test_a_run_that_names_itself_as_its_beginning_is_no_circle(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        run = tmp_path / one
        run.mkdir()
        (run / "recipe.yaml").write_text(f"backbone: {{weights: {tmp_path / other / 'model.safetensors'}}}")
        (run / "results.json").write_text(json.dumps(PRUNED))
    assert {row["epochs"] for row in read_static(str(tmp_path / "a"), REPORTS[0])} == {3 + 3}
