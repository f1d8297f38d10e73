"""Names of optimisers and schedules, as timm knows them."""

from __future__ import annotations

import functools

import torch
from timm.optim import get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2

from dynnet.errors import RecipeError, did_you_mean

_SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")  # timm has no list of them


def check_optimiser(name: str, what: str) -> None:
    """Refuse an optimiser that timm does not have.

    Args:
        name: timm's; "lookahead_" and the like may come before it.
        what: its key, for messages.

    Raises:
        RecipeError: it has none of that name.
    """
    try:
        get_optimizer_class(name.lower().split("_")[-1], bind_defaults=False)
    except (ValueError, KeyError):
        known = list_optimizers()
        raise RecipeError(f"{what}={name!r}: timm has no such optimiser{did_you_mean(name, known)}") from None


@functools.cache
def check_schedule(name: str, what: str) -> None:
    """Refuse a schedule that timm does not have, or cannot step after every update.

    Args:
        name: timm's.
        what: its key, for messages.

    Raises:
        RecipeError: it has none of that name.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    try:
        create_scheduler_v2(optimizer, name, num_epochs=10, step_on_epochs=False, updates_per_epoch=1)
    except (ValueError, AssertionError) as error:
        guess = did_you_mean(name, _SCHEDULES)
        raise RecipeError(f"{what}={name!r}: timm has no such schedule{guess} ({error})") from None
