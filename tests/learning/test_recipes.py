"""Recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest

from dynnet.config import WrapConfig
from dynnet.errors import RecipeError
from dynnet.gates.plan import GateConfig
from dynnet.learning.limits import LIMITS
from dynnet.learning.losses import BudgetConfig, LossConfig
from dynnet.learning.overrides import dotted_keys
from dynnet.learning.recipes import PruningConfig, Recipe, StageConfig, read_recipe, recipe_to_yaml


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
        ("sed: 1", [], "unknown key 'sed'; did you mean 'seed'"),
        ("joint: {epoch: 1}", [], "unknown key 'joint.epoch'; did you mean 'epochs'.*; joint has epochs, lr"),
        ("joint: {epochs: many}", [], "joint.epochs is 'many'; expected a whole number"),
        ("joint: {epochs: 3.0}", [], "joint.epochs is 3.0; expected a whole number"),
        ("joint: 3", [], "joint is 3; expected keys and values"),
        ("amp: 1", [], "amp is 1; expected true or false"),
        ("[1, 2]", [], r"the recipe .* is \[1, 2\]; expected keys and values"),
        ("loss: {weights: heavy}", [], "loss.weights is 'heavy'; expected 'equal' or 'depth' or a list"),
        ("data: {input_size: [8, 8]}", [], r"data.input_size is \[8, 8\]; expected a list of 3 or null"),
        ("gates: {unit: 2}", [], "unknown key 'gates.unit'; it is 'wrap.gates.unit' now"),
        (
            "backbone: {kwargs: {norm_layer: {a: 1}}}",
            [],
            "backbone.kwargs.norm_layer is .*; expected a whole",
        ),
        ("backbone: {kwargs: {'a b': 1}}", [], "backbone.kwargs has the key 'a b'; give names of arguments"),
        ("joint: {opt: sgdd}", [], "joint.opt='sgdd': timm has no such optimiser; did you mean 'sgd'"),
        ("heads: {sched: cosin}", [], "heads.sched='cosin': timm has no such schedule; did you mean 'cosine'"),
        ("calibration: {budget: 1, risk: 0.1}", [], "give one of budget, latency, accuracy_drop and risk"),
        ("calibration: {risk: 0}", [], "calibration.risk is 0.0; give a finite number above 0"),
        ("", ["--joint.epoch=1"], "unknown key 'joint.epoch'; did you mean 'joint.epochs'"),
        ("", ["--seed=x"], "seed is 'x'; expected a whole number"),
        ("", ["--seed.x=1"], "unknown key 'seed.x'"),
        ("", ["seed", "1"], "got 'seed', which belongs to no key"),
        ("", ["--wrap.gates.unt=1"], "unknown key 'wrap.gates.unt'; did you mean 'wrap.gates.unit'"),
        ("", ["--wrap.gates.unit"], r"wrap\.gates\.unit has no value"),
        ("", ["--joint="], r"joint has no value"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, text), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "recipe.yaml, line 1: expected the node content"),
        ("seed: 1\na: &x [1]\nb: *x", "line 2: anchors and aliases are not read"),
        ("a: *x", "line 1: anchors and aliases are not read"),
        ("<<: {seed: 1}", "unknown key '<<'"),
        ("seed: 1\njoint: {lr: 1}\nseed: 2", "line 3: the key 'seed' is there twice"),
        ("joint:\n  lr: 1\n  epochs: 1\n  lr: 2", "line 4: the key 'lr' is there twice"),
        ("seed: !!python/object/apply:os.getcwd []", "line 1: tags such as .*os.getcwd are not read"),
        ("seed: !!int 3", "line 1: tags such as"),
        ("a: " + "[" * 5000, "line 1: more than 20 mappings and lists within each other"),
        ("? [a, b]\n: 1", "line 1: a key is a mapping or a list"),
        ("seed: 1\n--- \nseed: 2", "line 2: but found another document"),
        ("seed: 0x" + "f" * 9000, "line 1: a whole number of more than 63 bits"),
        ("seed: " + "9" * 9000, "cannot read .*: Exceeds the limit"),
        ("seed: \0", "cannot read .*: unacceptable character"),
        ("#" * 100_001, "has more than 100000 bytes; is it a recipe?"),
    ],
)
def test_yaml_is_plain(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, text))
    if len(text) < 90_000:
        with pytest.raises(RecipeError):
            read_recipe(write(tmp_path, ""), [f"--wrap.gates={text}"])


def test_texts_stay_texts_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "data: {label: 2020-01-01}\njoint: {lr: 5e-2}\ndense: {lr: 1}")
    recipe = read_recipe(file, ["--data.root=2024", "--data.name=", "--backbone.weights", "null", "--ema=null"])
    assert (recipe.data.root, recipe.data.name, recipe.data.label) == ("2024", "", "2020-01-01")
    assert (recipe.backbone.weights, recipe.ema) == (None, None)
    assert type(recipe.dense.lr) is float


def test_every_number_has_its_limits() -> None:
    def counts(kind: Any) -> bool:
        return kind in (int, float) or any(counts(inner) for inner in get_args(kind))

    # Places as well as a number; where the model is made; where models are put in a row.
    elsewhere = {"wrap.exits", "backbone.kwargs", "cascade.input_sizes"}
    numbers = {key for key, kind in dotted_keys(Recipe).items() if counts(kind) and not key.startswith("data.")}
    assert len(numbers) > 60
    assert numbers - elsewhere == set(LIMITS)


@pytest.mark.parametrize("key", sorted(LIMITS))
def test_nonsense_is_found_when_a_recipe_is_read(key: str, tmp_path: Path) -> None:
    limit = LIMITS[key]
    below = limit.low if limit.open_low else limit.low - 1
    file = write(tmp_path, "wrap: {gates: {}}")
    for number in [below, math.nan, *([limit.high + 1] if limit.high < math.inf else [])]:
        if limit.whole and isinstance(number, float):
            continue
        text = f"[{number}, 1, 1]" if key in ("loss.weights", "wrap.input_size", "wrap.gates.widths") else str(number)
        with pytest.raises(RecipeError, match=f"recipe .*: {key} is .*{'whole' if limit.whole else 'finite'} number"):
            read_recipe(file, [f"--{key}={text.replace('nan', '.nan')}"])


def test_nonsense_is_found_in_python_too() -> None:
    with pytest.raises(RecipeError, match="joint.epochs is -1; give a whole number at least 0"):
        Recipe(joint=StageConfig(epochs=-1))
    with pytest.raises(RecipeError, match="joint.epochs is 1.5; give a whole number"):
        Recipe(joint=StageConfig(epochs=1.5))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="loss.temperature is 0; give a finite number above 0"):
        LossConfig(temperature=0)
    with pytest.raises(RecipeError, match="budget.sharpness is nan"):
        BudgetConfig(sharpness=math.nan)
    with pytest.raises(RecipeError, match="wrap.exits is 1000000000; give a whole number at least 0 and at most 1000"):
        Recipe(wrap=WrapConfig(exits=10**9))
    with pytest.raises(RecipeError, match="pruning.steps is 0"):
        Recipe(pruning=PruningConfig(steps=0))


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lookahead_adam", "SGD"])
@pytest.mark.parametrize("sched", ["cosine", "poly", "none"])
def test_names_that_timm_knows_pass(opt: str, sched: str) -> None:
    Recipe(joint=StageConfig(opt=opt, sched=sched))


def test_a_missing_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no file"):
        read_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no recipe 'nowhere.yaml'; the zoo's recipes are"):
        read_recipe("nowhere.yaml")
