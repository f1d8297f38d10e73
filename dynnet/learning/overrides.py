"""A command line that changes a configuration: dotted keys, and values in YAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dynnet.errors import RecipeError, did_you_mean
from dynnet.learning.plain_yaml import read_yaml
from dynnet.schema import keys_of, kinds_of, shown


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys of a command line, "--KEY VALUE" or "--KEY=VALUE", and their values as text; "" where there is none.

    Raises:
        RecipeError: something that belongs to no key.
    """
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise RecipeError(f"got {shown(argument)}, which belongs to no key; give --KEY VALUE")
        key, separator, value = argument.removeprefix("--").partition("=")
        yield key, value if separator else next(rest, "")


def override_(given: dict[str, Any], kind: type, key: str, text: str) -> None:
    """Put one value into what a file says, in place.

    Args:
        given: plain values by key.
        kind: the dataclass that they are meant for.
        key: dotted.
        text: the value, in YAML; where the dataclass wants a text, that text.

    Raises:
        RecipeError: an unknown key, or no value.
    """
    *parents, last = key.split(".")
    holder: Any = kind
    place = given
    for parent in parents:
        holder = keys_of(holder).get(parent)
        inside = place[parent] = place.get(parent) or {}
        if not isinstance(inside, dict):
            raise RecipeError(f"{key}: {parent} is {shown(inside)}; expected keys and values")
        place = inside
    hints = keys_of(holder)
    if last not in hints:
        raise RecipeError(f"unknown key {shown(key)}{did_you_mean(key, dotted_keys(kind))}")
    kinds = kinds_of(hints[last])
    # A folder may be named like a number.
    plain = str in kinds and (type(None) not in kinds or text != "null")
    value = text if plain else read_yaml(text, f"--{key}")
    if value is None and (type(None) not in kinds or not text):
        raise RecipeError(f"{key} has no value; give one")
    place[last] = value


def dotted_keys(kind: Any, path: str = "") -> dict[str, Any]:
    """The type hints of a dataclass and of those inside it, by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in keys_of(kind).items():
        here = f"{path}.{name}" if path else name
        found |= {here: hint, **dotted_keys(hint, here)}
    return found
