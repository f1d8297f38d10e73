"""Does what a file says have the form that it must have? Nothing is believed of JSON before it was read here."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


class SchemaError(ValueError):
    """What a file says has another form; the message names the place in it."""


def parse(text: str) -> Any:
    """JSON, strictly: no key twice, no NaN.

    Raises:
        SchemaError: it is something else, or nested so deeply that Python gives up.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"it is no JSON: {error}") from error


def read_as(kind: type[T], value: Any, where: str = "") -> T:
    """A value of JSON in the form that a type hint describes, lists as tuples where it says so.

    >>> read_as(tuple[int, ...], [3, 32, 32])
    (3, 32, 32)

    Args:
        kind: bool, int, float (finite), str, None, `Literal`, unions, `list[X]`, `tuple[X, ...]`, `tuple[X, Y]`,
            `dict[str, X]`, dataclasses of such, whose defaults serve for keys that are not there, `Any`; `Annotated`
            with functions that say in words what is wrong with a value, or None.
        value: as `parse` gives it.
        where: its place, for messages.

    Raises:
        SchemaError: it has another form.
    """
    return typing.cast(T, _read(kind, value, where))


def between(low: float, high: float) -> Callable[[float], str | None]:
    """For `Annotated`: a number in [low, high]."""
    return lambda value: None if low <= value <= high else f"a number from {low:g} to {high:g}"


def at_most(count: int) -> Callable[[Any], str | None]:
    """For `Annotated`: a text, list or mapping of at most so many parts."""
    return lambda value: None if len(value) <= count else f"at most {count} parts"


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        read = _read(parts[0], value, where)
        if wrong := next((told for check in parts[1:] if (told := check(read))), None):
            _refuse(wrong, value, where)
        return read
    if origin is Literal:
        return value if value in parts and not isinstance(value, bool) else _refuse(f"one of {parts}", value, where)
    if origin in (Union, types.UnionType):
        return _one_of(parts, value, where)
    if dataclasses.is_dataclass(kind):
        return _fields(typing.cast(type, kind), value, where)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _items(origin, parts, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _read(parts[1], entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if kind in (None, type(None)) and value is None:
        return None
    if kind is float and type(value) in (int, float) and abs(value) < math.inf:
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    return _refuse(names.get(origin or kind, "a list" if origin in (list, tuple) else "nothing"), value, where)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """What the first kind that fits reads; told is what the last one lacks, for what is nothing comes first."""
    refused: SchemaError | None = None
    for kind in kinds:
        try:
            return _read(kind, value, where)
        except SchemaError as error:
            refused = error if kind is not type(None) else refused
    assert refused is not None
    raise refused


def _items(origin: type, parts: tuple[Any, ...], value: Any, where: str) -> Any:
    kinds = parts if origin is tuple and parts[-1:] != (...,) else parts[:1] * len(value)
    if len(kinds) != len(value):
        _refuse(f"a list of {len(kinds)}", value, where)
    return origin(_read(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value, strict=True)))


def _fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _refuse("a mapping", value, where)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - fields.keys()):
        _refuse(f"no key but {', '.join(fields)}", unknown[0], where)
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in value]:
        raise SchemaError(f"{where or 'it'} has no {missing[0]!r}")
    dot = f"{where}." if where else ""
    return kind(**{name: _read(hints[name], entry, f"{dot}{name}") for name, entry in value.items()})


def _refuse(expected: str, value: Any, where: str) -> NoReturn:
    told = repr(value)
    told = told if len(told) <= 80 else f"{told[:77]}..."
    raise SchemaError(f"{where or 'it'} is {told}, expected {expected}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SchemaError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _no_number(constant: str) -> NoReturn:
    raise SchemaError(f"{constant} is no number of JSON")
