"""Static pruning: what a network can do without, once for all inputs."""

from typing import Any

from dynnet.pruning.blocks import Sensitivity, prune_layers, removable_blocks, remove_blocks, sensitivity
from dynnet.pruning.channels import prune
from dynnet.pruning.config import PruneConfig
from dynnet.pruning.criteria.units import CRITERIA
from dynnet.pruning.criteria.weights import WEIGHT_CRITERIA
from dynnet.pruning.norms import recalibrate_
from dynnet.pruning.single_weights import (
    make_permanent_,
    rewind_,
    scheduled,
    sparsify_,
    sparsify_n_m_,
    sparsity,
    to_semi_structured_,
)

__all__ = [
    "CRITERIA",
    "PruneConfig",
    "WEIGHT_CRITERIA",
    "Sensitivity",
    "make_permanent_",
    "prune",
    "prune_layers",
    "recalibrate_",
    "removable_blocks",
    "remove_blocks",
    "rewind_",
    "scheduled",
    "sensitivity",
    "sparsify_",
    "sparsify_n_m_",
    "sparsity",
    "to_semi_structured_",
]


def __getattr__(name: str) -> Any:
    if f"{name}_" in __all__:
        raise ImportError(f"dynnet.pruning.{name} is {name}_ now: it changes the model that it is given")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
