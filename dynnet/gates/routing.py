"""What routers have chosen in one call, and how a few nested widths run.

Samples of one width run together through every module that is narrowed, as through a narrow network of its own; then
they come together again. In training all widths run, and what they give is weighed by the choice.

    B samples of the batch, b of them with one width, C channels, K widths, U units of a region
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from dynnet.backbone.layers.kind import HALF
from dynnet.backbone.layers.norms import run_with
from dynnet.backbone.layers.table import channel_dim, run
from dynnet.backbone.subsets import Subset
from dynnet.exits.boundaries import Feature
from dynnet.exits.flow import features, take_rows, with_tensors
from dynnet.exits.rows import Rows
from dynnet.gates.containers import Place
from dynnet.gates.decisions import Decisions, Taken
from dynnet.gates.networks import Gates
from dynnet.gates.plan import Container, Site
from dynnet.gates.routers import Router, Routers

_PIXELS = {"nchw": (2, 3), "nhwc": (1, 2), "tokens": (1,), "vector": ()}


def decisions_of(gates: Gates, sparse: bool) -> Decisions:
    """Of one call of a model with these gates."""
    return Routed(gates, sparse) if isinstance(gates, Routers) else Decisions(gates, sparse)


def pooled(output: Any, feature: Feature) -> Tensor:
    """(B, C) the mean of what a router reads of a boundary's output."""
    x = features(output)[feature.leaf]
    x = x.detach() if torch.is_grad_enabled() else x  # what is exported shall not hold it
    dims = _PIXELS[feature.layout]
    wide = x.float() if x.dtype in HALF else x
    return wide.mean(dims).to(x.dtype) if dims else x


class Routed(Decisions):
    """What the routers have chosen in one call of one model.

    Attributes:
        gates: the routers.
        width: of what runs now; None outside of what is narrowed.
    """

    gates: Routers

    def __init__(self, gates: Routers, sparse: bool) -> None:
        super().__init__(gates, sparse)
        self.width: int | None = None
        self._choices: dict[int, Tensor] = {}  # (b, K) by region

    def arrive(self, exit: int, output: Any, rows: Rows) -> None:
        for number, region in enumerate(self.gates.plan.regions):
            if region.segment == exit + 1:
                self._route(number, output, rows)

    def _route(self, number: int, output: Any, rows: Rows) -> None:
        region = self.gates.plan.regions[number]
        assert region.feature is not None
        seen = pooled(output, region.feature)
        if self.gates.chosen is None:
            logits, choice = self.gates.route(number, seen)
        else:
            fixed = torch.full((seen.shape[0],), self.gates.chosen[number], device=seen.device)
            logits = choice = F.one_hot(fixed, len(region.widths)).float()
        network = self.gates.networks[number]
        assert isinstance(network, Router)
        self._choices[number] = choice
        # A product would be on the bill.
        masks = network.masks.float()  # which are counted: half precision would round
        opened = choice @ masks if self.gates.training else masks[choice.argmax(1)]
        self.taken[number] = Taken(rows.here, logits, opened)

    def contain(self, container: Container, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one module, narrowed as was chosen.

        Args:
            container: it.
            forward: its own.
            args, kwargs: that it is called with.
        """
        choice = self._choices.get(container.region)
        if choice is None:
            return forward(*args, **kwargs)
        copies: Any = self.gates.copies
        of_width = copies[self.gates.place[container.name]] if len(copies) else None
        if self.gates.training:
            return self._weighed(container, forward, args, kwargs, choice)
        picked = choice.argmax(1)
        widths = torch.unique(picked).tolist()  # the one synchronisation of a module

        def at(width: int, args: Any, kwargs: Any) -> Any:
            return self._at(width, forward, args, kwargs) if of_width is None else of_width[width](*args, **kwargs)

        if len(widths) == 1:
            return at(widths[0], args, kwargs)
        rows = [(picked == width).nonzero().squeeze(1) for width in widths]
        parts = [
            at(width, *_some((args, kwargs), container.takes, here)) for width, here in zip(widths, rows, strict=True)
        ]
        return _together(parts, container.gives, torch.cat(rows).argsort())

    def _weighed(
        self, container: Container, forward: Callable[..., Any], args: Any, kwargs: Any, choice: Tensor
    ) -> Any:
        """All widths, of which each sample gets the one that was chosen; gradients tell what others had given."""
        if self.gates.chosen is not None:
            return self._at(self.gates.chosen[container.region], forward, args, kwargs)
        parts = [self._at(width, forward, args, kwargs) for width in range(choice.shape[1])]
        return _sum(parts, container.gives, choice)

    def _at(self, width: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before, self.width = self.width, width
        try:
            return forward(*args, **kwargs)
        finally:
            self.width = before

    def apply(self, site: Site, layer: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        if self.width is None:
            return run(layer, x, None, None)
        reads, makes = self.gates.narrow(site.reads, self.width), self.gates.narrow(site.makes, self.width)
        if not self.sparse:
            if reads is not None and site.zeroes:
                x = x * _mask(reads, x, channel_dim(layer, x))
            reads = makes = None
        number = self.gates.number.get(site.layer)
        if number is None or self.width == len(self.gates.plan.regions[0].widths) - 1:
            return run(layer, x, reads, makes) if number is None else run_with(layer, x, reads, None)
        norm: Any = self.gates.norms[number]
        return run_with(layer, x, reads, (norm.mean[self.width], norm.var[self.width]))


def _mask(there: Subset, x: Tensor, dim: int) -> Tensor:
    mask = torch.zeros(there.width, dtype=x.dtype, device=x.device).index_fill(0, there.channels(), 1)
    return mask.view([-1 if d == dim else 1 for d in range(x.ndim)])


def _some(given: Any, places: Sequence[Place], rows: Tensor) -> Any:
    """Any nesting of tensors with only some samples."""
    flat, spec = tree_flatten(given)
    tensors = _tensors(flat)
    new = {at: take_rows(tensors[at], rows, dim, each) for at, dim, each in places}
    return tree_unflatten(with_tensors(flat, new), spec)


def _together(parts: Sequence[Any], places: Sequence[Place], order: Tensor) -> Any:
    """What groups of samples gave, one after the other, in the order of the batch."""
    flat, spec = tree_flatten(parts[0])
    tensors = [_tensors(tree_flatten(part)[0]) for part in parts]
    new = {at: take_rows(torch.cat([one[at] for one in tensors], dim), order, dim, each) for at, dim, each in places}
    return tree_unflatten(with_tensors(flat, new), spec)


def _sum(parts: Sequence[Any], places: Sequence[Place], weights: Tensor) -> Any:
    """What all widths gave, weighed by (B, K)."""
    flat, spec = tree_flatten(parts[0])
    tensors = [_tensors(tree_flatten(part)[0]) for part in parts]
    new = {}
    for at, dim, each in places:
        shape = [-1 if d == dim else 1 for d in range(tensors[0][at].ndim)]
        of_rows = (weights if each == 1 else weights.repeat_interleave(each, 0)).to(tensors[0][at].dtype)
        new[at] = torch.stack([one[at] * of_rows[:, k].view(shape) for k, one in enumerate(tensors)]).sum(0)
    return tree_unflatten(with_tensors(flat, new), spec)


def _tensors(flat: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in flat if isinstance(leaf, Tensor)]
