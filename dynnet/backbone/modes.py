"""Somebody's model as it is found: its mode, its device, and what its own code raises."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from dynnet.backbone.layers.table import effect_of
from dynnet.backbone.names import title
from dynnet.errors import DynnetError, ForwardError


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every module in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """Train mode for what holds other modules, and so decides which of them run; for a dry run, in which dropout and
    the statistics of one batch would only be in the way. Afterwards every module is in the mode in which it was."""
    with evaluating(model):
        for module in model.modules():
            module.training = effect_of(module) is None and any(True for _ in module.children())
        yield


@contextlib.contextmanager
def somebodys_forward(model: nn.Module) -> Iterator[None]:
    """Code that is not ours runs: whatever it raises, of any kind, is told as the model's own.

    Raises:
        ForwardError: in its place; errors of dynnet's pass.
    """
    try:
        yield
    except DynnetError:
        raise
    except Exception as raised:
        raise ForwardError.of(raised, title(model)) from raised


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
