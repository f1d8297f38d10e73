"""Static pruning: what a network can do without, once for all inputs."""

from dynnet.pruning.layers import Sensitivity, prune_layers, removable_blocks, remove_blocks, sensitivity
from dynnet.pruning.recalibrate import recalibrate
from dynnet.pruning.structured import prune
from dynnet.pruning.units import CRITERIA
from dynnet.pruning.unstructured import (
    make_permanent,
    rewind,
    scheduled,
    sparsify,
    sparsify_n_m,
    sparsity,
    to_semi_structured,
)
from dynnet.pruning.weights import WEIGHT_CRITERIA

__all__ = [
    "CRITERIA",
    "WEIGHT_CRITERIA",
    "Sensitivity",
    "make_permanent",
    "prune",
    "prune_layers",
    "recalibrate",
    "removable_blocks",
    "remove_blocks",
    "rewind",
    "scheduled",
    "sensitivity",
    "sparsify",
    "sparsify_n_m",
    "sparsity",
    "to_semi_structured",
]
