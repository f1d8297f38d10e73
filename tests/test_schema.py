"""Plain values and what type hints promise."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from dynnet.errors import CheckpointError, RecipeError, SchemaError
from dynnet.schema import between, flat, parse, told, typed


@dataclass(frozen=True)
class Inner:
    count: int
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner | None = None
    names: tuple[str, ...] = ()
    size: tuple[int, int] = (1, 1)
    kind: Literal["a", "b"] | tuple[float, ...] = "a"
    more: dict[str, int | float | bool | list[int] | None] = field(default_factory=dict)


class Mapped(TypedDict):
    inner: Inner
    loose: NotRequired[float]


def test_plain_values_become_what_hints_promise() -> None:
    given = {"inner": {"count": 3, "share": 1}, "names": ["x"], "size": [2, 3], "kind": [1, 0.5]}
    made = typed(Outer, {**given, "more": {"a": 1, "b": True, "c": 1.5, "d": None, "e": [1]}})
    assert made == Outer(Inner(3, 1.0), ("x",), (2, 3), (1.0, 0.5), {"a": 1, "b": True, "c": 1.5, "d": None, "e": [1]})
    assert type(made.inner.share) is float
    assert [type(value) for value in made.more.values()] == [int, bool, float, type(None), list]
    assert typed(Outer, {}) == Outer()
    assert typed(Mapped, {"inner": {"count": 1}, "other": [1]}) == {"inner": Inner(1), "other": [1]}
    assert typed(list[float], [1, 2.0]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Outer, {"inner": {"count": True}}, "inner.count is True; expected a whole number"),
        (Outer, {"inner": {"count": 1.0}}, "inner.count is 1.0; expected a whole number"),
        (Outer, {"inner": {"count": 2**64}}, "inner.count is a whole number of 65 bits; expected a whole number"),
        (Outer, {"inner": {"share": 1}}, "inner lacks 'count'"),
        (Outer, {"inner": 3}, "inner is 3; expected keys and values or null"),
        (Outer, {"iner": 3}, "unknown key 'iner'; did you mean 'inner'?; it has inner, names, size, kind, more"),
        (Outer, {"names": "x"}, "names is 'x'; expected a list"),
        (Outer, {"names": ["x", 1]}, "names[1] is 1; expected a text"),
        (Outer, {"size": [1, 2, 3]}, "size is [1, 2, 3]; expected a list of 2"),
        (Outer, {"kind": "c"}, "kind is 'c'; expected 'a' or 'b' or a list"),
        (
            Outer,
            {"more": {"a": "x"}},
            "more.a is 'x'; expected a whole number or a number or true or false or a",
        ),
        (Outer, {"more": {1: 1}}, "more has the key 1; expected a text"),
        (Outer, [], "it is []; expected keys and values"),
        (Mapped, {}, "it lacks 'inner'"),
        (Mapped, {"inner": {"count": 1}, "loose": "x"}, "loose is 'x'; expected a number"),
        (None, 1, "it is 1; expected null"),
    ],
)
def test_what_does_not_fit_is_told(kind: Any, given: Any, message: str) -> None:
    for error in (RecipeError, CheckpointError):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            typed(kind, given, error=error)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(SchemaError) as raised:
        typed(Outer, {"names": "x" * 10_000})
    assert len(str(raised.value)) < 100


def test_what_an_annotation_expects_is_told() -> None:
    side = Annotated[int, between(1, 64)]
    assert typed(tuple[side, ...], [1, 64]) == (1, 64)
    with pytest.raises(SchemaError, match=r"^size\[1\] is 65; expected a number from 1 to 64$"):
        typed(tuple[side, ...], [1, 65], "size")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[1", "it is no JSON"),
        ("[" * 100_000, "it is no JSON: maximum recursion"),
        ("1" * 10_000, "it is no JSON"),
    ],
)
def test_what_is_no_json_is_told(text: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        parse(text)
    assert parse('{"a": [1, null, "NaN"]}') == {"a": [1, None, "NaN"]}
    assert parse("[Infinity]", finite=False) == [float("inf")]


def test_what_lies_within_is_flattened() -> None:
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert dict(flat(Outer(Inner(1))))["inner.count"] == 1
    assert told(int | None) == "a whole number or null"
