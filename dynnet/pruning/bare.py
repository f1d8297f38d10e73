"""Pruning takes bare models."""

from __future__ import annotations

from torch import nn

from dynnet.backbone.masks import not_plain
from dynnet.errors import PruneError
from dynnet.wrapping import is_wrapped


def check_bare(model: nn.Module, masked: bool = False) -> None:
    """Refuse what cannot be pruned as it is.

    Args:
        model: about to be pruned.
        masked: may it have masks on its weights?

    Raises:
        PruneError: it is wrapped, or has masks or other weights that are no plain parameters.
    """
    if is_wrapped(model):
        raise PruneError("a wrapped model is pruned before it is wrapped; call unwrap() first, wrap what comes out")
    if told := not_plain(model, masked):
        raise PruneError(told)
