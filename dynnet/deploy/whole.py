"""A dynamic model as one plain forward, from which a graph is made: nobody leaves, every exit answers, nothing hooks in
that asks for numbers.

    B batch, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dynnet.backbone.twin import copy_of
from dynnet.exits.boundaries import Feature
from dynnet.exits.calls import Heads
from dynnet.exits.confidence import Measure
from dynnet.exits.rows import Rows
from dynnet.gates.decisions import Decisions
from dynnet.gates.networks import Gates
from dynnet.gates.plan import Site
from dynnet.gates.routing import pooled
from dynnet.model import DynamicModel


class Whole(nn.Module):
    """From images (B, C, H, W) to logits (B, K) and confidence (B,) of every exit that runs, and of the end; and behind
    those what routers say of widths.

    Gates on channels decide, and what they close is zero; it is computed all the same. Made of a copy.

    Args:
        model: without routers: of one width.
        routers: where routers stand, the networks and what they read, by the number of the exit. Where an exit does not
            run, what its router says stands for its answer, and nobody is sure of that.

    Attributes:
        exits: numbers of the exits that answer, or where routers stand.
    """

    def __init__(self, model: DynamicModel, routers: Mapping[int, tuple[nn.Module, Feature]] | None = None) -> None:
        super().__init__()
        self.routers = copy.deepcopy(dict(routers or {}))
        self.networks = nn.ModuleList(network for network, _ in self.routers.values()).eval()
        model = copy_of(model).eval()
        self.on = [i for i, on in enumerate(model.running) if on]
        self.exits = [*sorted({*self.on, *self.routers}), len(model.exits)]
        names, self.measure, self.heads, self.gates = model.exits, model.measure, model.heads, model.gates
        self.backbone = model.unwrap()
        joined = Heads(list(self.heads))
        for index, name in enumerate(names):
            if index in self.exits or joined.wanted(index):
                self.backbone.get_submodule(name).register_forward_hook(self._hook(index))
        self._call = _Call()
        for site in self.gates.plan.sites if isinstance(self.gates, Gates) else ():
            layer: Any = self.backbone.get_submodule(site.layer)
            layer.forward = _Masked(layer, site, self._call)
        self._answers: list[tuple[Tensor, Tensor]] = []
        self._routes: list[Tensor] = []
        self._memory: Tensor | None = None

    def _hook(self, index: int) -> Any:
        def answer(module: nn.Module, args: Any, output: Any) -> None:
            joined = self._call.heads.wanted(index)
            logits = self._call.heads(index, output) if index in self.on or joined else None
            if index in self.on and logits is not None:
                self._answer(logits)
            if index in self.routers:
                network, feature = self.routers[index]
                route = network(pooled(output, feature)).float()
                self._routes.append(route)
                if index not in self.on:
                    self._answers.append((route, torch.zeros_like(route[:, 0])))

        return answer

    def _answer(self, logits: Tensor) -> None:
        confidence, self._memory = self.measure(logits, self._memory)
        self._answers.append((logits, confidence))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        self._answers, self._routes, self._memory = [], [], None
        # No flow is running, for it would ask for the length of the batch, which then were a constant of the graph.
        self._call.rows = Rows(x.shape[0])
        self._call.heads = Heads(list(self.heads))
        self._call.decisions = Decisions(self.gates, sparse=False) if isinstance(self.gates, Gates) else None
        self._answer(self.backbone(x))
        found = (*self._answers, *self._routes)
        self._answers, self._routes, self._memory = [], [], None
        self._call.decisions = None
        return found


class _Call:
    """What is known in one forward: who is there, what exits said, and what gates decided."""

    rows: Rows
    heads: Heads
    decisions: Decisions | None = None


class _Masked:
    """Stands in for the `forward` of a layer that listens to gates."""

    def __init__(self, layer: nn.Module, site: Site, call: _Call) -> None:
        self.layer, self.site, self.call = layer, site, call

    def __call__(self, x: Tensor) -> Tensor:
        assert self.call.decisions is not None
        return self.call.decisions.apply(self.site, self.layer, x, self.call.rows)


class Nowhere(Measure):
    """Stands in for a measure that no graph can hold: it is asked on the host, and this is not looked at."""

    name = "nowhere"

    def __call__(self, logits: Tensor, memory: Tensor | None) -> tuple[Tensor, None]:
        return logits[:, 0].float(), None


def fits_a_graph(measure: Measure, classes: int) -> bool:
    """Can a measure be exported, or is it Python that looks at numbers?

    Args:
        classes: K.
    """

    class Asked(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            confidence, memory = measure(logits, None)
            return measure(logits, memory)[0] + confidence

    try:
        with torch.no_grad():
            torch.export.export(
                Asked(), (torch.randn(3, classes),), dynamic_shapes=({0: Dim("b", min=1)},), strict=False
            )
    except Exception:  # of somebody else's code
        return False
    return True
