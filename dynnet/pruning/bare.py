"""Pruning takes bare models."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from dynnet.errors import PruneError
from dynnet.wrap import is_wrapped


def check_bare(model: nn.Module, masked: bool = False) -> None:
    """Refuse what cannot be pruned as it is.

    Args:
        model: about to be pruned.
        masked: may it have masks on its weights?

    Raises:
        PruneError: it is wrapped, or has masks.
    """
    if is_wrapped(model):
        raise PruneError("a wrapped model is pruned before it is wrapped; call unwrap() first, wrap what comes out")
    masks = [] if masked else [name for name, module in model.named_modules() if is_parametrized(module)]
    if masks:
        raise PruneError(f"{masks[0]} has a mask on its weights; call make_permanent(model) first")
