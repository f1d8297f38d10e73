"""Recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynnet.errors import RecipeError
from dynnet.gates.plan import GateConfig
from dynnet.learning.recipes import Recipe, read_recipe, recipe_to_yaml


def write(path: Path, text: str) -> Path:
    file = path / "recipe.yaml"
    file.write_text(text)
    return file


def test_a_recipe_reads_back(tmp_path: Path) -> None:
    text = (
        "wrap: {exits: [layer1, 0.5]}\nloss: {weights: [0.3, 0.4]}\ndata: {input_size: [1, 8, 8]}\njoint: {lr: 5e-2}\n"
    )
    recipe = read_recipe(write(tmp_path, text), ["--joint.epochs", "3", "--seed=4"])
    assert recipe.wrap.exits == ("layer1", 0.5)
    assert recipe.loss.weights == (0.3, 0.4)
    assert recipe.data.input_size == (1, 8, 8)
    assert (recipe.joint.lr, recipe.joint.epochs, recipe.seed) == (0.05, 3, 4)
    assert read_recipe(write(tmp_path, recipe_to_yaml(recipe))) == recipe
    assert read_recipe(write(tmp_path, "")) == Recipe()


def test_gates_of_a_file_can_be_changed(tmp_path: Path) -> None:
    file = write(tmp_path, "wrap: {gates: {unit: 4, blocks: 1}}")
    assert read_recipe(file, ["--wrap.gates.unit", "2", "--seed=4"]).wrap.gates == GateConfig(2, 1)
    assert read_recipe(file, ["--wrap.gates={unit: 2}", "--wrap.gates.exclude=[fc]"]).wrap.gates == GateConfig(
        2, 4, ("fc",)
    )
    assert read_recipe(file, ["--wrap.gates", "null"]).wrap.gates is None
    assert read_recipe(write(tmp_path, ""), ["--wrap.gates.blocks=2"]).wrap.gates == GateConfig(8, 2)


@pytest.mark.parametrize("path", sorted(Path("models").glob("*/recipe.yaml")), ids=lambda p: p.parent.name)
def test_the_zoos_recipes_are_valid(path: Path) -> None:
    assert read_recipe(path).description


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("sed: 1", [], "unknown recipe key 'sed'; did you mean 'seed'"),
        ("joint: {epoch: 1}", [], "unknown recipe key 'joint.epoch'; did you mean 'epochs'.*; joint has epochs, lr"),
        ("joint: {epochs: many}", [], r'(?s)"joint.epochs".*Expected a .*int.*many'),
        ("joint: 3", [], "joint is a int; expected keys and values"),
        ("[1, 2]", [], "the recipe is a list"),
        ("a: [", [], "cannot read recipe"),
        ("", ["--joint.epoch=1"], "unknown recipe key 'joint.epoch'; did you mean 'joint.epochs'"),
        ("", ["--seed=x"], '(?s)"seed".*Expected'),
        ("", ["--wrap.gates.unt=1"], "unknown recipe key 'wrap.gates.unt'; did you mean 'unit'"),
        ("", ["--wrap.gates.unit"], r"wrap\.gates\.unit has no value"),
        ("", ["--wrap.gates=["], r"cannot read wrap.gates='\['"),
        ("loss: {weights: heavy}", [], "(?s)loss.weights.*heavy"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, text), overrides)


def test_a_missing_recipe_is_told() -> None:
    with pytest.raises(RecipeError, match="no recipe 'nowhere.yaml'; the zoo's recipes are"):
        read_recipe("nowhere.yaml")
