"""Within which limits the numbers of a recipe make sense: what is outside would be found out hours later, or never."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from dynnet.learning.ranges import check_range


class Limit(NamedTuple):
    """From `low` to `high`, both allowed themselves unless it is `open_low`; only whole numbers where it is `whole`."""

    low: float = 0
    high: float = 1
    whole: bool = False
    open_low: bool = False


_SHARE = Limit()
_SOME = Limit(open_low=True)  # a share above 0
_NOT_ALL = Limit(high=0.999999)
_COUNT = Limit(1, 2**31, whole=True)
_POSITIVE = Limit(0, 1e6, open_low=True)
_SIDE = Limit(1, 2**16, whole=True)

# The batches of epoch e of stage s are those of epoch EPOCHS * s + e of their loader.
EPOCHS = 10_000

_STAGE = {
    "epochs": Limit(0, EPOCHS - 1, whole=True),
    "lr": _POSITIVE,
    "batch_size": Limit(1, 2**20, whole=True),
    "momentum": _NOT_ALL,
    "weight_decay": Limit(0, 100),
    "warmup": _SHARE,
    "final_lr": _SHARE,
    "clip_grad": _POSITIVE,
}

# By the dotted name of a recipe's key; for lists, of each of their numbers. What `data` says is checked with the data.
LIMITS: dict[str, Limit] = {
    "seed": Limit(0, 2**62, whole=True),
    "wrap.gates.unit": _COUNT,
    "wrap.gates.blocks": _COUNT,
    "wrap.gates.widths": _SOME,
    "wrap.head_share": _SOME,
    "wrap.input_size": _SIDE,
    "loss.weights": Limit(0, 1e6),
    "loss.ramp": _SHARE,
    "loss.distill": _SHARE,
    "loss.temperature": _POSITIVE,
    "loss.label_smoothing": _SHARE,
    "budget.target": _SHARE,
    "budget.weight": _POSITIVE,
    "budget.ramp": _SHARE,
    "budget.relax": _SHARE,
    "budget.leave_at": Limit(-1e6, 1e6),
    "budget.sharpness": _POSITIVE,
    "budget.quiet": _SHARE,
    "consolidate.batches": _COUNT,
    "calibration.budget": Limit(0, math.inf, open_low=True),
    "calibration.latency": Limit(0, math.inf, open_low=True),
    "calibration.batch_size": Limit(1, 2**20, whole=True),
    "calibration.accuracy_drop": Limit(high=0.999999, open_low=True),
    "calibration.risk": Limit(high=0.999999, open_low=True),
    "calibration.delta": Limit(high=0.999999, open_low=True),
    "pruning.macs": _SOME,
    "pruning.latency": _SOME,
    "pruning.sparsity": _NOT_ALL,
    "pruning.steps": Limit(1, 1000, whole=True),
    "pruning.floor": _SHARE,
    "pruning.multiple": _SIDE,
    "pruning.batches": _COUNT,
    "pruning.n": _COUNT,
    "pruning.m": _COUNT,
    "pruning.recalibrate": _COUNT,
    "pruning.distill": _SHARE,
    "pruning.temperature": _POSITIVE,
    "pruning.slimming": Limit(0, 1e6),
    "pruning.rewind": Limit(0, EPOCHS - 1, whole=True),
    "ema": _NOT_ALL,
    "mixup": Limit(0, 1e6),
    "cutmix": Limit(0, 1e6),
    "log_steps": _COUNT,
    "checkpoint_steps": _COUNT,
    **{f"{stage}.{key}": limit for stage in ("dense", "heads", "joint", "finetune") for key, limit in _STAGE.items()},
}


def check_limits(config: Any, path: str = "") -> None:
    """Refuse numbers that make no sense.

    Args:
        config: a recipe, or a part of one.
        path: its dotted name in a recipe.

    Raises:
        RecipeError: a number outside its limits, or NaN, with its dotted name.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(value):
            check_limits(value, name)
        elif name in LIMITS and value is not None and not isinstance(value, str):
            limit = LIMITS[name]
            for number in value if isinstance(value, tuple | list) else (value,):
                check_range(number, name, limit.low, limit.high, whole=limit.whole, open_low=limit.open_low)
