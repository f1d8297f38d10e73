"""Plain values, as YAML and JSON give them, to what type hints promise: recipes, descriptions, checkpoints, results.

Nothing that a file says is believed before it was read here.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, NotRequired, Union, get_args, get_origin

from dynnet.errors import DynnetError, SchemaError, did_you_mean

_WIDEST = 63  # bits of a whole number; a longer one is a mistake, and may not be printable


def parse(text: str, finite: bool = True) -> Any:
    """JSON, with no key twice.

    Args:
        text: of a whole file.
        finite: refuse NaN and infinity, which JSON does not know, but Python writes.

    Raises:
        SchemaError: it is something else, or nested more deeply than Python reads.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number if finite else float)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"it is no JSON: {error}") from error


def typed(kind: Any, given: Any, what: str = "", error: type[DynnetError] = SchemaError) -> Any:
    """A plain value as a type hint promises it.

    >>> typed(tuple[int, ...], [3, 32, 32])
    (3, 32, 32)

    Args:
        kind: a dataclass (made from a mapping of its fields), a TypedDict (whose other keys stay as they are), int,
            float (made from whole numbers too), str, bool, None, Any, a Literal, a tuple (made from a list), a list, a
            dict with texts for keys, a union of those; or one of them, `Annotated` with functions that say in words
            what is expected of it where it is something else.
        given: the plain value.
        what: its dotted name, for messages; "" for a whole.
        error: what is raised.

    Raises:
        DynnetError: `error`: an unknown or a missing key, or a value of another type, with its dotted name.
    """
    if kind is Any:
        return given
    if get_origin(kind) is NotRequired:
        return typed(get_args(kind)[0], given, what, error)
    if get_origin(kind) is Annotated:
        value = typed(get_args(kind)[0], given, what, error)
        for expected in filter(None, (check(value) for check in kind.__metadata__)):
            raise error(f"{what or 'it'} is {shown(given)}; expected {expected}")
        return value
    fitting = [one for one in kinds_of(kind) if _fits(one, given)]
    if not fitting:
        raise error(f"{what or 'it'} is {shown(given)}; expected {told(kind)}")
    chosen = next((one for one in fitting if one is type(given)), fitting[0])
    if get_origin(chosen) is Annotated:
        return typed(chosen, given, what, error)
    if isinstance(given, Mapping):
        return _mapping(chosen, given, what, error)
    if isinstance(given, list | tuple):
        kinds = _kinds_of_entries(chosen, len(given))
        entries = [typed(one, x, f"{what}[{i}]", error) for i, (one, x) in enumerate(zip(kinds, given, strict=True))]
        return entries if get_origin(chosen) is list else tuple(entries)
    return float(given) if chosen is float else given


def between(low: float, high: float) -> Callable[[float], str | None]:
    """For `Annotated`: a number from `low` to `high`, both allowed themselves."""
    return lambda value: None if low <= value <= high else f"a number from {low:g} to {high:g}"


def keys_of(kind: Any) -> dict[str, Any]:
    """The type hints of a dataclass or TypedDict by name; of a union, those of the one that it holds."""
    holders = [one for one in kinds_of(kind) if dataclasses.is_dataclass(one) or typing.is_typeddict(one)]
    return typing.get_type_hints(holders[0], include_extras=True) if holders else {}


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The kinds of a union; a hint that is none by itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return get_args(hint)
    return (type(None) if hint is None else hint,)


def flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what lies within mappings and dataclasses; empty mappings are values."""
    if dataclasses.is_dataclass(values):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    if not isinstance(values, Mapping) or (not values and path):
        yield path, values
        return
    for key, value in values.items():
        yield from flat(value, f"{path}.{key}" if path else str(key))


def shown(given: Any) -> str:
    """A value in a message, however long it is."""
    if isinstance(given, int) and given.bit_length() > _WIDEST:
        return f"a whole number of {given.bit_length()} bits"
    return reprlib.repr(given)


def told(kind: Any) -> str:
    """A type hint in words."""
    return " or ".join(dict.fromkeys(_told(one) for one in kinds_of(kind)))


def _told(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _told(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " or ".join(repr(value) for value in get_args(kind))
    if get_origin(kind) in (tuple, list):
        entries = get_args(kind)
        count = "" if get_origin(kind) is list or Ellipsis in entries else f" of {len(entries)}"
        return f"a list{count}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(kind, "keys and values")


def _fits(kind: Any, given: Any) -> bool:
    """Is a value of this kind, apart from what is inside it?"""
    origin = get_origin(kind)
    if origin is Annotated:
        return _fits(get_args(kind)[0], given)
    if origin is Literal:
        return any(type(given) is type(value) and given == value for value in get_args(kind))
    if origin in (tuple, list):
        counted = origin is tuple and Ellipsis not in get_args(kind)
        return isinstance(given, list | tuple) and (not counted or len(given) == len(get_args(kind)))
    if kind is float or kind is int:
        number = isinstance(given, int) and not isinstance(given, bool) and given.bit_length() <= _WIDEST
        return number or (kind is float and isinstance(given, float))
    if origin is dict or dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return isinstance(given, Mapping)
    return isinstance(given, kind)


def _kinds_of_entries(kind: Any, count: int) -> Sequence[Any]:
    entries = get_args(kind)
    return [entries[0]] * count if get_origin(kind) is list or Ellipsis in entries else entries


def _mapping(kind: Any, given: Mapping[Any, Any], what: str, error: type[DynnetError]) -> Any:
    if get_origin(kind) is dict:
        entry = get_args(kind)[1]
        return {_text(key, what, error): typed(entry, value, f"{what}.{key}", error) for key, value in given.items()}
    hints = typing.get_type_hints(kind, include_extras=True)
    unknown = [key for key in given if key not in hints]
    if unknown and dataclasses.is_dataclass(kind):
        name = f"{what}.{unknown[0]}" if what else str(unknown[0])
        raise error(
            f"unknown key {shown(name)}{did_you_mean(str(unknown[0]), hints)}; {what or 'it'} has {', '.join(hints)}"
        )
    missing = [name for name in _required(kind, hints) if name not in given]
    if missing:
        raise error(f"{what or 'it'} lacks {missing[0]!r}")
    found = {key: typed(hints.get(key, Any), value, f"{what}.{key}" if what else key, error)
             for key, value in given.items()}  # fmt: skip
    return found if typing.is_typeddict(kind) else kind(**found)


def _required(kind: Any, hints: Mapping[str, Any]) -> list[str]:
    """Names of the keys that have to be there."""
    if not dataclasses.is_dataclass(kind):
        return [name for name, hint in hints.items() if get_origin(hint) is not NotRequired]
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is none and f.default_factory is none]


def _text(key: Any, what: str, error: type[DynnetError]) -> str:
    if not isinstance(key, str):
        raise error(f"{what} has the key {shown(key)}; expected a text")
    return key


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SchemaError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_number(constant: str) -> NoReturn:
    raise SchemaError(f"{constant} is no number of JSON")
