"""What somebody's code keeps beside a model, put back after a dry run.

A twin has lists, caches and attributes of its own. But functions are not copied with it, hooks among them, nor are
classes and modules of Python: what a hook appends to a list in its closure, what a forward writes into a cache of its
class or of its file, it would write there in a dry run too, tensors without numbers.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 100_000  # objects that are looked at, in the order in which they are found
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, np.ndarray, types.ModuleType, torch.dtype)
# Whose objects are left alone: a queue, a logger or a loader may be another thread's.
_THEIRS = sys.stdlib_module_names | {"torch", "numpy", "dynnet"}
_LIBRARIES = _THEIRS | {"timm", "torchvision"}  # whose functions and classes keep nothing
_MODULES = frozenset(vars(nn.Module()))
_ABSENT = object()


@contextlib.contextmanager
def unaltered(model: nn.Module) -> Iterator[None]:
    """Afterwards whatever the code of a model has changed beside its tensors is as it was.

    These are lists, dictionaries, sets and attributes of objects that can be reached from the model: from its modules,
    hooks, functions and classes, through closures, defaults and the globals that they name; functions that remember
    their answers forget those; and random numbers go on as if none had been drawn. What leaves the process (a file, a
    logger) stays there, and what another thread has written into the same list meanwhile is lost.
    """
    put_back = _snapshot(model)
    try:
        yield
    finally:
        for put in put_back:
            put()


def _snapshot(model: nn.Module) -> list[Callable[[], object]]:
    """For everything that can be changed, what puts it back."""
    put_back: list[Callable[[], object]] = [
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
        functools.partial(random.setstate, random.getstate()),
        functools.partial(np.random.set_state, np.random.get_state()),
    ]
    seen: dict[int, Any] = {}  # held, or an identity might be used twice
    waiting = deque[Any]([model])
    while waiting and len(seen) < _MOST:
        x = waiting.popleft()
        if isinstance(x, _PLAIN) or id(x) in seen:
            continue
        seen[id(x)] = x
        found, put = _look_at(x)
        waiting.extend(found)
        if put is not None:
            put_back.append(put)
    return put_back


def _look_at(x: Any) -> tuple[list[Any], Callable[[], object] | None]:
    """What can be reached from an object, and what puts the object back."""
    if isinstance(x, dict):
        held = dict(x)
        return list(held.values()), functools.partial(_fill, x, held)
    if isinstance(x, (list, set, deque)):
        return list(x), functools.partial(_fill, x, x.copy())
    if isinstance(x, (tuple, frozenset)):
        return list(x), None
    if isinstance(x, types.FunctionType):
        return _of_function(x)
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__], None
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords], None
    if isinstance(x, types.CellType):
        content = _content(x)
        return [content], functools.partial(_set_content, x, content)
    if isinstance(x, type):
        own = (
            {} if _is_of(_LIBRARIES, x) else {key: value for key, value in vars(x).items() if not key.startswith("__")}
        )
        return [*own.values(), *x.__bases__], functools.partial(_set_all, x, own) if own else None
    if isinstance(x, functools._lru_cache_wrapper):
        return [x.__wrapped__], functools.partial(_forget, x, x.cache_info().misses)
    attributes = getattr(x, "__dict__", None)
    theirs = _is_of(_THEIRS, type(x)) and not isinstance(x, (nn.Module, types.SimpleNamespace))
    if theirs or not isinstance(attributes, dict):
        return [], None
    # What torch keeps of every module is mostly empty: hooks of a dozen kinds.
    values = [value for key, value in attributes.items() if key not in _MODULES or value]
    return [*values, type(x)], functools.partial(_fill, attributes, attributes.copy())


def _of_function(function: types.FunctionType) -> tuple[list[Any], Callable[[], object] | None]:
    if _is_of(_LIBRARIES, function):
        return [], None
    reached = [*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__]
    names = {name: function.__globals__.get(name, _ABSENT) for name in _names(function.__code__)}
    return [*reached, *names.values()], functools.partial(_set_globals, function.__globals__, names)


def _names(code: types.CodeType) -> set[str]:
    """Names that a function, or one within it, may look up in its file."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _is_of(libraries: Collection[str], x: Any) -> bool:
    return str(getattr(x, "__module__", None)).partition(".")[0] in libraries


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return _ABSENT


# Putting back.


def _fill(x: Any, before: Any) -> None:
    """Only where it has changed, and without emptying it first: another thread may be reading."""
    if isinstance(x, dict):
        for key in [key for key in x if key not in before]:
            del x[key]
        for key, value in before.items():
            if x.get(key, _ABSENT) is not value:
                x[key] = value
    elif isinstance(x, set):
        x.intersection_update(before)
        x.update(before)
    elif len(x) != len(before) or any(a is not b for a, b in zip(x, before, strict=True)):
        if isinstance(x, list):
            x[:] = before
        else:
            x.clear()
            x.extend(before)


def _set_content(cell: types.CellType, before: Any) -> None:
    if before is not _ABSENT and _content(cell) is not before:
        cell.cell_contents = before


def _set_globals(of: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if of.get(name, _ABSENT) is value:
            continue
        if value is _ABSENT:
            del of[name]
        else:
            of[name] = value


def _set_all(of: type, before: dict[str, Any]) -> None:
    for key in [key for key in vars(of) if key not in before and not key.startswith("__")]:
        delattr(of, key)
    for key, value in before.items():
        if vars(of).get(key, _ABSENT) is not value:
            setattr(of, key, value)


def _forget(remembering: Any, misses: int) -> None:
    if remembering.cache_info().misses != misses:
        remembering.cache_clear()
