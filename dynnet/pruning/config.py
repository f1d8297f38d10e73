"""What is taken away, and how it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from dynnet.errors import PruneError

Scope = Literal["global", "group"]
TARGETS = ("macs", "params", "latency")


@dataclass(frozen=True)
class CutConfig:
    """What all ways to prune have in common.

    Attributes:
        macs: target, as a share of the model's MACs.
        latency: in its place, as a share of the time that one image takes, folded, measured here and now.
        steps: reach the target in so many cuts, scoring anew before each.
        scope: "global" ranks the units of all groups together, "group" takes the same share of each.
        floor: share of its units that every group keeps.
        multiple: widths stay multiples of this; of half of it, a quarter, where a group is too narrow for four steps.
        exclude: modules, by name, whose channels stay.
        batches: of the loader, that criteria look at.
    """

    macs: float | None = None
    latency: float | None = None
    steps: int = 1
    scope: Scope = "global"
    floor: float = 0.1
    multiple: int = 8
    exclude: tuple[str, ...] = ()
    batches: int = 10


@dataclass(frozen=True)
class PruneConfig(CutConfig):
    """What `dynnet.prune` takes away: `CutConfig`, and

    Attributes:
        criterion: a name from `dynnet.pruning.CRITERIA`.
        params: target in place of `macs` and `latency`, as a share of the parameters. One of the three.
        seed: of what is random in a criterion.
    """

    criterion: str = "taylor"
    params: float | None = None
    seed: int = 0

    @property
    def target(self) -> tuple[str, float]:
        """What is aimed at, and its share."""
        given = [(key, share) for key in TARGETS if (share := getattr(self, key)) is not None]
        if len(given) != 1:
            told = ", ".join(f"{key}={share:g}" for key, share in given) or "no target"
            raise PruneError(f"got {told}: give one of {', '.join(TARGETS)}")
        return cast(tuple[str, float], given[0])
