"""Do tensors fit a model? Names and shapes, told in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dynnet.errors import CheckpointError

_STATE = "_extra_state"  # what a wrapped model says of itself besides its weights, in bytes of any number


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Strict loading; raises as `check_weights`, and leaves the model untouched then."""
    check_weights(model, tensors, source)
    model.load_state_dict(dict(tensors), strict=False)


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Have tensors the names and shapes that a model has?

    Raises:
        CheckpointError: a name that is missing or unknown, or a shape that differs.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_STATE)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_STATE)}
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unknown or shapes:
        problems = [
            f"lacks {len(missing)} tensors (first {missing[0]!r})" if missing else "",
            f"has {len(unknown)} unknown tensors (first {unknown[0]!r})" if unknown else "",
            f"{shapes[0]!r} has shape {tuple(tensors[shapes[0]].shape)}, the model's is {tuple(own[shapes[0]].shape)}"
            if shapes
            else "",
        ]
        raise CheckpointError(f"{str(source)!r} is of another model: {'; '.join(p for p in problems if p)}")
