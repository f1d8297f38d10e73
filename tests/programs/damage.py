"""Accidents: what chance, a dying process or somebody's editor makes of a file."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynnet.files.bundles import read_bundle, write_bundle

VALUES: list[Any] = [
    None, True, -1, 0, 1, 1.5, 10**12, 10**30, 1e308, float("nan"), float("-inf"), "x", "",
    [], [1], {}, {"a": 1}, [[[[]]]],
]  # fmt: skip


def alter(whole: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy of plain values, of which one or two are gone, doubled, or others."""
    found = copy.deepcopy(whole)
    for _ in range(chance.randint(1, 2)):
        place: Any = found
        while place:
            key: Any = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
            if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.7:
                place = place[key]
                continue
            kind = chance.randrange(3)
            if kind == 0:
                del place[key]
            elif kind == 1 and isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            else:
                place[key] = copy.deepcopy(chance.choice(VALUES))
            break
    return found


def resign(path: Path, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Alter what a bundle says, with a SHA-256 that is right."""
    tensors, about = read_bundle(path)
    write_bundle(path, tensors, changed(about))
