"""`wrap`: check everything, rehearse on the meta device, then attach exits to a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynnet import flow
from dynnet.errors import ExitError, HeadError
from dynnet.exits import Boundary, Places, input_size_of, title
from dynnet.flow import Flow, Tag
from dynnet.heads import ExitHead, HeadFactory
from dynnet.model import DynamicModel, WrapConfig
from dynnet.policy import make_measure
from dynnet.probe import BATCH, trace


def wrap(
    backbone: nn.Module,
    exits: int | Sequence[str | float] = 2,
    *,
    heads: HeadFactory | None = None,
    head_share: float = 0.01,
    confidence: str | Callable[[Tensor], Tensor] = "max_probability",
    input_size: tuple[int, int, int] | None = None,
) -> DynamicModel:
    """Give a backbone exits. Its forward is not rewritten; `unwrap()` gives it back as it came.

    Args:
        backbone: any timm classifier, or module from (B, C, H, W) images to (B, K) logits.
        exits: module names ("layer2"), fractions of the backbone's MACs (0.5), both mixed, or a number of exits spread
            evenly in MACs.
        heads: builds a head of your own: called with a `Boundary` and K, gives a module from the boundary's output to
            (B, K) logits. By default heads are fitted to the features.
        head_share: MACs that a fitted head may cost, as a share of the backbone's.
        confidence: "max_probability", "margin", "entropy", "patience", or a callable from (B, K) logits to (B,) numbers.
        input_size: (C, H, W) of the images; by default what the backbone was made for.

    Returns:
        A model in the backbone's mode, on its device, with all thresholds at inf: nobody leaves yet.

    Raises:
        ExitError: an exit that cannot stand where it was asked for; the backbone is left untouched.
        HeadError: a head that does not answer with (B, K) logits; the backbone is left untouched.
    """
    if isinstance(backbone, DynamicModel) or flow.is_attached(backbone):
        raise ExitError(f"{title(backbone)} is wrapped already; call unwrap() first")
    if not 0 < head_share < 1:
        raise HeadError(f"head_share={head_share}: give a share of the backbone's MACs in (0, 1), such as 0.01")
    make_measure(confidence, 0)  # an unknown name is refused before anything is built
    size = input_size or input_size_of(backbone)
    places = Places(backbone, size)
    boundaries = places.resolve(exits)
    config = WrapConfig(
        exits=tuple(b.name for b in boundaries),
        input_size=size,
        head_share=head_share,
        confidence=confidence if isinstance(confidence, str) else "custom",
        heads="fitted" if heads is None else "custom",
    )
    factory = heads or _fitted(places, head_share)
    modules = [_like(factory(boundary, places.num_classes), backbone, boundary) for boundary in boundaries]
    tag = Tag()
    model = DynamicModel(backbone, modules, boundaries, config, places.num_classes, confidence, tag)
    flow.attach(backbone, tag, boundaries, places.companions(boundaries))
    try:
        _rehearse(model)
        model.ledger()
    except BaseException:
        flow.detach(backbone)
        raise
    return model


def unwrap(model: DynamicModel) -> nn.Module:
    """The backbone as it came, without hooks."""
    return model.unwrap()


def _fitted(places: Places, head_share: float) -> HeadFactory:
    budget = head_share * places.trace.macs / BATCH

    def build(boundary: Boundary, num_classes: int) -> nn.Module:
        return ExitHead(boundary, num_classes, places.last_grid, budget)

    return build


def _like(head: Any, backbone: nn.Module, boundary: Boundary) -> nn.Module:
    if not isinstance(head, nn.Module):
        raise HeadError(f"the head for exit {boundary.name!r} is a {type(head).__name__}; build a torch.nn.Module")
    parameter = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    return head if parameter is None else head.to(parameter.device, parameter.dtype)


class _Rehearsal(Flow):
    """Some rows leave at every exit, on the meta device: shapes tell whether the backbone can go on without them."""

    def __init__(self, model: DynamicModel) -> None:
        super().__init__(model._tag)
        self.model = model
        self.running = BATCH

    def reach(self, index: int, output: Any, leaves: Sequence[int]) -> Any:
        name = self.model.exits[index]
        logits = self.model.heads[index](output)
        expected = (self.running, self.model.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise HeadError(
                f"the head of exit {name!r} answers {got} where (B, K) = {expected} is needed; build it for "
                f"{self.model.num_classes} classes"
            )
        self.running = self.running * 2 // 3
        return self.thin_out(output, leaves, torch.arange(self.running, device="meta"))


def _rehearse(model: DynamicModel) -> None:
    rehearsal = _Rehearsal(model)

    def forward(images: Tensor) -> Tensor:
        with flow.run(rehearsal):
            return model.backbone(images)
        raise AssertionError("a rehearsal never finishes early")

    where = f"rows cannot leave {title(model.backbone)} at exits {list(model.exits)}"
    try:
        seen = trace(model, model.config.input_size, BATCH, forward)
    except HeadError:
        raise
    except Exception as error:
        raise ExitError(
            f"{where}: what follows still needs the whole batch ({type(error).__name__}: {error}); choose other exits"
        ) from error
    rows = seen.output[0].shape[0]
    if rows != rehearsal.running:
        raise ExitError(f"{where}: {rows} rows came out where {rehearsal.running} went on; choose other exits")
