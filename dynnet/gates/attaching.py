"""Layers that listen to gates: an attribute of the instance stands in for their `forward`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynnet.backbone.gradients import checkpointed
from dynnet.backbone.layers.table import run
from dynnet.errors import GateError, InputError
from dynnet.exits import flow
from dynnet.exits.flow import Tag
from dynnet.gates.plan import GatePlan, Site


class GatedForward:
    """Stands in for the `forward` of one layer, and leaves it alone unless gates are deciding.

    An attribute of the instance: the layer keeps its class, its parameters and its name, and copies take it along.
    """

    def __init__(self, layer: nn.Module, site: Site, tag: Tag) -> None:
        self.layer, self.site, self.tag = layer, site, tag

    def __call__(self, x: Tensor) -> Tensor:
        running = flow.running(self.tag)
        if running is None or running.decisions is None:
            return run(self.layer, x, None, None)
        if running.learns and checkpointed():
            raise InputError(
                f"gradient checkpointing would run {self.site.layer} again when what gates decided is forgotten; "
                f"switch it off with set_grad_checkpointing(False)"
            )
        return running.decisions.apply(self.site, self.layer, x, running.rows)


def attach(backbone: nn.Module, tag: Tag, plan: GatePlan) -> None:
    """Let the layers of a backbone listen to gates; `detach` undoes it.

    Raises:
        GateError: a layer has a `forward` set on the instance, which would be lost; nothing is attached.
    """
    for site in plan.sites:
        if "forward" in vars(backbone.get_submodule(site.layer)):
            raise GateError(
                f"{site.layer} has a forward of its own, set on the instance; remove it, or exclude the layer"
            )
    for site in plan.sites:
        layer: Any = backbone.get_submodule(site.layer)
        layer.forward = GatedForward(layer, site, tag)


def detach(backbone: nn.Module) -> None:
    """Give every layer its own forward back."""
    for module in backbone.modules():
        if _is_gated(module):
            del module.__dict__["forward"]


def is_attached(backbone: nn.Module) -> bool:
    return any(_is_gated(module) for module in backbone.modules())


def _is_gated(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), GatedForward)
