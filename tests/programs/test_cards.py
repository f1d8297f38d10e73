"""The cards of the zoo, and the program that writes them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import dynnet
from dynnet import zoo
from dynnet.errors import CheckpointError, InputError
from dynnet.learning.recipes import read_recipe
from eval import cards, shelf
from eval.runs import open_zoo

NAMES = dynnet.list_models()

# A figure that was measured has decimals and a unit; cards have such only in what is written from results.
MEASURED = re.compile(r"\d+\.\d+ ?(?:%|x\b|ms\b|MMAC\b)")


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_its_results_say(name: str) -> None:
    page = (zoo.folder() / name / "README.md").read_text()
    shown = cards.read_shown(zoo.folder() / name / "results.json")
    before, _, rest = page.partition(cards.BEGIN)
    written, _, after = rest.partition(cards.END)
    assert written.strip() == cards.card(shown)
    assert not MEASURED.findall(before + after)
    assert (zoo.folder() / name / "accuracy.png").is_file()


@pytest.mark.parametrize(("path", "linked"), [(cards.README, True), (cards.GUIDE, False)])
def test_readme_and_guide_say_what_the_results_say(path: Path, linked: bool) -> None:
    written = path.read_text().partition(cards.BEGIN)[2].partition(cards.END)[0]
    found = {name: cards.read_shown(zoo.folder() / name / "results.json") for name in NAMES}
    assert written.strip() == cards.shelf(found, linked)


@pytest.mark.sweep
def test_what_is_measured_is_what_a_card_needs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_SINGLE", 40)
    monkeypatch.setattr(shelf, "_BATCHES", 3)
    model, data = open_zoo("digits")
    recipe, file = read_recipe(zoo.folder() / "digits" / "recipe.yaml"), zoo.folder() / "digits" / "model.safetensors"
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shown = shelf.shelved(model, file, recipe, data, [other], "onnxruntime", 32)
    cards.write_json(shown, tmp_path / "results.json")
    again = cards.read_shown(tmp_path / "results.json")
    before = cards.read_shown(zoo.folder() / "digits" / "results.json")
    for key in ("accuracy", "mean_macs", "dense_macs", "dense_accuracy", "never_exiting_macs", "size_bytes"):
        assert again[key] == pytest.approx(before[key], rel=0.01), key
    assert sum(exit["rate"] for exit in again["exits"]) == pytest.approx(1)
    assert again["never_exiting_macs"] == again["dense_macs"]
    (row,) = again["beside"]
    assert row["what"] == "cifar_resnet20, dynamic"
    assert row["epochs"] == 5
    assert again["ms"].keys() == row["ms"].keys() == {"1", "32"}
    assert min(*again["ms"].values(), *row["ms"].values(), *(point["ms"] for point in again["curve"])) > 0
    accuracies = [point["accuracy"] for point in again["curve"]]
    assert max(accuracies) <= max(exit["accuracy_of_all"] for exit in again["exits"]) + 0.02
    assert cards.picture("digits", again).startswith(b"\x89PNG")
    assert f"(`{other.name}`) | 5 |" in cards.card(again)


def test_a_card_without_marks_and_a_run_that_is_none_are_told(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# a card")
    with pytest.raises(CheckpointError, match=r"has no lines '<!-- written by python -m eval.cards -->' and"):
        cards.rewrite(page, "text")
    page.write_text(f"a\n{cards.BEGIN}\nold\n{cards.END}\nb\n")
    cards.rewrite(page, "new")
    assert page.read_text() == f"a\n{cards.BEGIN}\n\nnew\n\n{cards.END}\nb\n"
    model, data = open_zoo("digits")
    recipe = read_recipe(zoo.folder() / "digits" / "recipe.yaml")
    file = zoo.folder() / "digits" / "model.safetensors"
    with pytest.raises(CheckpointError, match="holds no finished run to stand beside"):
        shelf.shelved(model, file, recipe, data, [tmp_path], "onnxruntime", 8)
    with pytest.raises(InputError, match=r"got 359 test images for batches of 1000; give a smaller --batch_size"):
        shelf.shelved(model, file, recipe, data, [], "onnxruntime", 1000)
