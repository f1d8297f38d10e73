"""Do tensors fit a model? Names and shapes, told in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dynnet.errors import CheckpointError
from dynnet.model import STATE


def load_weights_(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Strict loading of weights; what a wrapped model says besides them stays as it is.

    Raises:
        CheckpointError: as `check_weights`; the model is left untouched then.
    """
    check_weights(model, tensors, source)
    besides = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(STATE)}
    model.load_state_dict({**besides, **tensors})


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Have tensors the names and shapes that a model has?

    Raises:
        CheckpointError: a name that is missing or unknown, or a shape or a kind of number that differs.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(STATE)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(STATE)}
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    others = (told for name in own if name in tensors and (told := unlike(name, tensors[name], own[name])))
    problems = [
        f"lacks {len(missing)} tensors (first {missing[0]!r})" if missing else None,
        f"has {len(unknown)} unknown tensors (first {unknown[0]!r})" if unknown else None,
        next(others, None),
    ]
    if any(problems):
        raise CheckpointError(f"{str(source)!r} is of another model: {'; '.join(p for p in problems if p)}")


def unlike(name: str, tensor: Tensor, own: Tensor) -> str | None:
    """Why a tensor cannot take the place of a model's own, in words; None where it can."""
    if tensor.shape != own.shape:
        return f"{name!r} has shape {tuple(tensor.shape)}, the model's is {tuple(own.shape)}"
    if (tensor.is_floating_point(), tensor.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return f"{name!r} is of {tensor.dtype}, the model's of {own.dtype}"
    return None
