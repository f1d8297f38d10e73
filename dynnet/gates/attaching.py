"""Layers, and modules around them, that listen to gates: an attribute of the instance stands in for their `forward`."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from dynnet.backbone.gradients import checkpointed
from dynnet.backbone.layers.table import run
from dynnet.errors import GateError, InputError
from dynnet.exits import flow
from dynnet.exits.flow import Tag
from dynnet.gates.plan import Container, GatePlan, Site
from dynnet.gates.routing import Routed


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


class ContainedForward:
    """Stands in for the `forward` of a module that runs once for each width, as `GatedForward` does for layers."""

    def __init__(self, module: nn.Module, container: Container, tag: Tag) -> None:
        self.module, self.container, self.tag = module, container, tag

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = flow.running(self.tag)
        own = functools.partial(type(self.module).forward, self.module)
        if running is None or not isinstance(running.decisions, Routed):
            return own(*args, **kwargs)
        return running.decisions.contain(self.container, own, args, kwargs)


def attach(backbone: nn.Module, tag: Tag, plan: GatePlan) -> None:
    """Let the layers of a backbone listen to gates; `detach` undoes it.

    Raises:
        GateError: a layer has a `forward` set on the instance, which would be lost; nothing is attached.
    """
    sites = {site.layer: site for site in plan.sites}
    sites = {name: Site(name, None, None, None, zeroes=False, tied=False) for name in plan.norms} | sites
    for name in (*sites, *(container.name for container in plan.containers)):
        if "forward" in vars(backbone.get_submodule(name)):
            raise GateError(f"{name} has a forward of its own, set on the instance; remove it, or exclude the layer")
    for name, site in sites.items():
        layer: Any = backbone.get_submodule(name)
        layer.forward = GatedForward(layer, site, tag)
    for container in plan.containers:
        module: Any = backbone.get_submodule(container.name)
        module.forward = ContainedForward(module, container, tag)


def detach(backbone: nn.Module) -> None:
    """Give every layer its own forward back."""
    for module in backbone.modules():
        if _is_gated(module):
            del module.__dict__["forward"]


def is_attached(backbone: nn.Module) -> bool:
    return any(_is_gated(module) for module in backbone.modules())


def _is_gated(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), GatedForward | ContainedForward)
