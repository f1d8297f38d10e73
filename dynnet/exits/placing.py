"""Names, shares of the MACs and numbers of exits, as users give them, to boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dynnet.backbone.names import title
from dynnet.errors import ExitError
from dynnet.exits.boundaries import Boundary, Places


def resolve(places: Places, exits: int | Sequence[str | float]) -> list[Boundary]:
    """Turn names, fractions of the MACs, or a number of exits into boundaries, in running order.

    Raises:
        ExitError: a name that is none, a fraction outside (0, 1), exits out of order or twice, too many exits.
    """
    if isinstance(exits, int) and exits > len(places.candidates):
        raise _too_few(places, exits)  # before that many are spread
    wanted = _as_list(exits)
    named = [places.boundary(exit) if isinstance(exit, str) else None for exit in wanted]
    chosen: list[Boundary] = []
    for i, boundary in enumerate(named):
        if boundary is not None:
            if chosen:
                _check_order(places, chosen[-1], boundary)
            chosen.append(boundary)
        elif i == len(chosen):  # the first of a run of fractions, which are placed together
            following = next((b for b in named[i:] if b is not None), None)
            stop = named.index(following) if following else len(named)
            fractions = [exit for exit in wanted[i:stop] if isinstance(exit, float)]
            chosen += _nearest(places, fractions, chosen[-1] if chosen else None, following)
    return chosen


def _as_list(exits: int | Sequence[str | float]) -> list[str | float]:
    """Names and fractions; a number of exits is spread evenly."""
    if isinstance(exits, bool) or not isinstance(exits, (int, Sequence)) or isinstance(exits, str):
        raise ExitError(f"exits={exits!r}: give a list of module names and fractions, or a number of exits")
    if isinstance(exits, int):
        if exits < 0:
            raise ExitError(f"exits={exits}: the number of exits cannot be negative")
        return [(i + 1) / (exits + 1) for i in range(exits)]
    for exit in exits:
        if not isinstance(exit, (str, float)):
            raise ExitError(f"exit {exit!r}: give a module name, or a fraction of the MACs such as 0.5")
    return list(exits)


def _check_order(places: Places, before: Boundary, boundary: Boundary) -> None:
    if places.end(boundary) <= places.end(before):
        verb = "stands twice" if boundary.name == before.name else f"does not come after {before.name!r}"
        raise ExitError(f"exit {boundary.name!r} {verb}; list exits once each, in the order of the forward")


def _nearest(
    places: Places, fractions: Sequence[float], after: Boundary | None, before: Boundary | None
) -> list[Boundary]:
    """Boundaries in running order between two given ones, as near to the fractions in sum as can be."""
    _check_fractions(fractions, after, before)
    free = _between(places, after, before)
    if len(free) < len(fractions):
        raise _too_few(places, len(fractions), after, before)
    # best[k]: the cheapest choice for the first k fractions among the boundaries seen so far.
    best: list[tuple[float, list[Boundary]]] = [(0.0, []), *((float("inf"), []) for _ in fractions)]
    for boundary in free:
        for k in range(len(fractions), 0, -1):
            cost = best[k - 1][0] + abs(boundary.macs_share - fractions[k - 1])
            if cost < best[k][0]:
                best[k] = (cost, [*best[k - 1][1], boundary])
    return best[-1][1]


def _too_few(places: Places, count: int, after: Boundary | None = None, before: Boundary | None = None) -> ExitError:
    between = f" between {after.name if after else 'the input'!r} and {before.name if before else 'the head'!r}"
    return ExitError(
        f"{title(places.backbone)} has {len(_between(places, after, before))} usable boundaries"
        f"{between if after or before else ''}, too few for {count} exits; a boundary is a module whose output carries "
        f"the whole state, batch first"
    )


def _between(places: Places, after: Boundary | None, before: Boundary | None) -> list[Boundary]:
    low = places.end(after) if after else -1
    high = places.end(before) if before else float("inf")
    return [boundary for boundary in places.candidates if low < places.end(boundary) < high]


def _check_fractions(fractions: Sequence[float], after: Boundary | None, before: Boundary | None) -> None:
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise ExitError(f"exit {fraction}: a fraction lies strictly between 0 and 1")
        named = after if after and fraction <= after.macs_share else None
        named = named or (before if before and fraction >= before.macs_share else None)
        if named is not None:
            raise ExitError(
                f"exit {fraction} is out of order: {named.name!r} stands at {named.macs_share:.3f} of the MACs; list "
                f"exits in the order of the forward"
            )
    if any(b <= a for a, b in pairwise(fractions)):
        raise ExitError(f"exits {list(fractions)}: list fractions in rising order, each once")
