"""Recipes that chance has damaged are read as recipes, or refused in words; nothing else happens."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import yaml

from dynnet.errors import DataError, RecipeError
from dynnet.learning.limits import check_limits
from dynnet.learning.overrides import dotted_keys
from dynnet.learning.recipes import Recipe, read_recipe, recipe_to_yaml
from tests.watching import watched

TEXTS = [path.read_text() for path in sorted(Path("models").glob("*/recipe.yaml"))]
SCALARS = [
    "1", "-1", "0", "1e400", "-.inf", ".nan", "9" * 400, "0x" + "f" * 4000, "1_000", "1:30", "null", "~", "''", "true",
    "no", "layer1", "'\\0'", "2001-99-99", "=", "<<", "? x", "&a [*a]", "*a", "!!python/object/apply:os.mkdir [{made}]",
    "!!set {a, b}", "!!binary AAAA", "[1, [2, [3]]]", "{a: {b: {c: 1}}}", "@", "`", "%x", "\t", "\U0001f600", "\udcff",
]  # fmt: skip


def damaged(text: str, chance: random.Random, made: Path) -> bytes:
    """A recipe after one to three accidents."""
    for _ in range(chance.randint(1, 3)):
        lines = text.split("\n")
        i, j = chance.randrange(len(lines)), chance.randrange(len(lines))
        kind = chance.randrange(9)
        scalar = chance.choice(SCALARS).replace("{made}", str(made))
        if kind == 0:
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == 1:
            lines.insert(i, lines[j])
        elif kind == 2:
            del lines[i]
        elif kind == 3 and ":" in lines[i]:
            lines[i] = lines[i].split(":")[0] + ": " + scalar
        elif kind == 4:
            *parents, last = chance.choice(list(dotted_keys(Recipe))).split(".")
            value = f"{last}: {scalar}"
            for parent in reversed(parents):
                value = f"{parent}: {{{value}}}"
            lines.append(value)
        elif kind == 5:
            lines.append("x: " + chance.choice("[{") * chance.choice([3, 30, 3000]))
        elif kind == 6:
            names = "abcdefghijklmnopqrst"
            lines += ["a: &a [1, 1]", *(f"{y}: &{y} [*{x}, *{x}]" for x, y in itertools.pairwise(names))]
        elif kind == 7:
            lines[i] = " " * chance.randrange(9) + lines[i].strip()
        text = "\n".join(lines)
        if kind == 8 and text:
            at = chance.randrange(len(text))
            text = text[:at] + chr(ord(text[at]) ^ (1 << chance.randrange(8))) + text[at + 1 :]
    return text.encode(errors="surrogateescape")


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.sweep)])
def test_a_damaged_recipe_is_read_or_refused_in_words(count: int, tmp_path: Path) -> None:
    file, made, longest = tmp_path / "recipe.yaml", tmp_path / "made", 0.0
    read, told = 0, []
    for seed in range(count):
        chance = random.Random(seed)
        file.write_bytes(damaged(chance.choice(TEXTS), chance, made))
        began = time.process_time()
        try:
            with watched(file) as seen:
                recipe = read_recipe(file)
        except (RecipeError, DataError) as error:
            told.append(str(error))
        else:
            read += 1
            check_limits(recipe)
            file.write_text(recipe_to_yaml(recipe))
            assert read_recipe(file) == recipe, seed
        assert seen == [], seed
        longest = max(longest, time.process_time() - began)
    assert not made.exists()
    assert min(read, len(told)) > count / 10
    assert max(map(len, told)) < 2000
    assert longest < 5


def test_the_damage_would_run_code_elsewhere(tmp_path: Path) -> None:
    made = tmp_path / "made"
    yaml.unsafe_load(f"seed: !!python/object/apply:os.mkdir [{made}]")
    assert made.exists()
