"""What a model knows of the sizes of images that it met last.

Images of a new size cost a dry run. A service that takes images of any size meets thousands of them: only the last are
kept in mind, and one that was forgotten costs its dry run again.
"""

from __future__ import annotations

from typing import NamedTuple

from dynnet.cost.ledger import Ledger
from dynnet.exits.noted_sizes import Line

REMEMBERED = 64  # sizes


class Size(NamedTuple):
    """What a dry run told about images of one size.

    Attributes:
        ledger: prices.
        noted: where the forward reshapes to a size of the batch that it noted before an exit.
    """

    ledger: Ledger
    noted: frozenset[Line]


class Sizes:
    """Sizes of images (C, H, W), the last that were asked for."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Size] = {}  # the last asked for stands last

    def __len__(self) -> int:
        return len(self._known)

    def get(self, size: tuple[int, ...]) -> Size | None:
        """What is known of a size; None where nothing is."""
        known = self._known
        found = known.get(size)
        if found is not None and size != next(reversed(known)):
            self.put(size, found)
        return found

    def put(self, size: tuple[int, ...], found: Size) -> None:
        """Keep a size in mind."""
        # A new dictionary: another thread may be copying the model. What it adds in between is found anew.
        others = [item for item in self._known.items() if item[0] != size]
        self._known = dict([*others[-(REMEMBERED - 1) :], (size, found)])
