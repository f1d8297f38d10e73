"""Static pruning: what a network can do without, once for all inputs."""

from dynnet.pruning.blocks import Sensitivity, prune_layers, removable_blocks, remove_blocks, sensitivity
from dynnet.pruning.channels import prune
from dynnet.pruning.criteria.units import CRITERIA
from dynnet.pruning.criteria.weights import WEIGHT_CRITERIA
from dynnet.pruning.norms import recalibrate
from dynnet.pruning.single_weights import (
    make_permanent,
    rewind,
    scheduled,
    sparsify,
    sparsify_n_m,
    sparsity,
    to_semi_structured,
)

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
