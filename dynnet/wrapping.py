"""`wrap`: check everything, rehearse on the meta device, then attach exits to a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from dynnet.backbone.dry_run import BATCH, trace
from dynnet.backbone.input_size import input_size_of
from dynnet.backbone.names import title
from dynnet.channels.groups import find_groups
from dynnet.errors import ExitError, HeadError
from dynnet.exits import flow
from dynnet.exits.boundaries import Boundary, Places
from dynnet.exits.confidence import make_measure
from dynnet.exits.heads import ExitHead, HeadFactory
from dynnet.exits.rehearsal import place
from dynnet.gates.networks import attach as attach_gates
from dynnet.gates.networks import detach as detach_gates
from dynnet.gates.networks import is_attached as gates_attached
from dynnet.gates.plan import GateConfig, GatePlan, check_gates, plan_gates
from dynnet.model import DynamicModel, WrapConfig


def wrap(
    backbone: nn.Module,
    exits: int | Sequence[str | float] = 2,
    *,
    gates: Literal["channel"] | GateConfig | None = None,
    heads: HeadFactory | None = None,
    head_share: float = 0.005,
    confidence: str | Callable[[Tensor], Tensor] = "max_probability",
    input_size: tuple[int, int, int] | None = None,
) -> DynamicModel:
    """Give a backbone exits. Its forward is not rewritten; `unwrap()` gives it back as it came.

    Args:
        backbone: any timm classifier, or module from (B, C, H, W) images to (B, K) logits.
        exits: module names ("layer2"), fractions of the backbone's MACs (0.5), both mixed, or a number of exits spread
            evenly in MACs.
        gates: "channel" gives channels learned gates, in blocks of 8; a `GateConfig` says more. By default none.
        heads: builds a head of your own: called with a `Boundary` and K, gives a module from the boundary's output to
            (B, K) logits. By default heads are fitted to the features.
        head_share: MACs that a fitted head may cost, as a share of the backbone's; up to twice that where it cannot be
            narrower.
        confidence: "max_probability", "margin", "entropy", "patience", or a callable from (B, K) logits to (B,)
            numbers.
        input_size: (C, H, W) of the images; by default what the backbone was made for.

    Returns:
        A model in the backbone's mode, on its device, with all thresholds at inf: nobody leaves yet.

    Raises:
        ExitError: an exit that cannot stand where it was asked for; the backbone is left untouched.
        GateError: nothing to gate, and why; the backbone is left untouched.
        HeadError: a head that does not answer with (B, K) logits; the backbone is left untouched.
    """
    if is_wrapped(backbone):
        raise ExitError(f"{title(backbone)} is wrapped already; call unwrap() first")
    if not 0 < head_share < 1:
        raise HeadError(f"head_share={head_share}: give a share of the backbone's MACs in (0, 1), such as 0.005")
    make_measure(confidence, 0)  # an unknown name is refused before anything is built
    size = input_size or input_size_of(backbone)
    places = Places(backbone, size)
    placement = place(places, exits)
    boundaries = placement.exits
    if placement.problem is not None:
        raise ExitError(
            f"rows cannot leave {title(backbone)} at {[b.name for b in boundaries]}: what follows still needs the "
            f"whole batch ({placement.problem}); choose other exits"
        )
    gating = check_gates(gates)
    plan = None if gating is None else _plan(places, boundaries, gating)
    config = WrapConfig(
        exits=tuple(b.name for b in boundaries),
        input_size=size,
        head_share=head_share,
        confidence=confidence if isinstance(confidence, str) else "custom",
        heads="fitted" if heads is None else "custom",
        gates=gating,
    )
    factory = heads or _fitted(places, head_share)
    modules = [_checked(factory(boundary, places.num_classes), backbone, boundary) for boundary in boundaries]
    model = DynamicModel(backbone, modules, placement, config, places.num_classes, confidence, plan)
    if model.gates is not None:
        _beside(model.gates, backbone)
        attach_gates(backbone, model.tag, model.gates.plan)
    flow.attach(backbone, model.tag, boundaries, placement.companions)
    try:
        _check_heads(model)
        model.ledger()
    except BaseException:
        flow.detach(backbone)
        detach_gates(backbone)
        raise
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Is it a wrapped model, or the backbone of one?"""
    return isinstance(model, DynamicModel) or flow.is_attached(model) or gates_attached(model)


def unwrap(model: DynamicModel) -> nn.Module:
    """The backbone as it came, without hooks."""
    return model.unwrap()


def _fitted(places: Places, head_share: float) -> HeadFactory:
    budget = head_share * places.trace.macs / BATCH

    def build(boundary: Boundary, num_classes: int) -> nn.Module:
        return ExitHead(boundary, num_classes, places.last_grid, budget)

    return build


def _plan(places: Places, boundaries: Sequence[Boundary], config: GateConfig) -> GatePlan:
    backbone = places.backbone
    groups = find_groups(backbone, places.input_size, [b.name for b in boundaries])
    layers = {name: macs // BATCH for name, macs in places.trace.layers.items()}
    sideways = {call.name for call in places.trace.calls if any(leaf.batch_dim != 0 for leaf in call.leaves)}
    modules = dict(backbone.named_modules())
    return plan_gates(groups, config, layers, places.trace.macs // BATCH, modules, sideways, title(backbone))


def _checked(head: Any, backbone: nn.Module, boundary: Boundary) -> nn.Module:
    if not isinstance(head, nn.Module):
        raise HeadError(f"the head for exit {boundary.name!r} is a {type(head).__name__}; build a torch.nn.Module")
    return _beside(head, backbone)


def _beside(module: nn.Module, backbone: nn.Module) -> nn.Module:
    """On the backbone's device, in its type."""
    parameter = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    return module if parameter is None else module.to(parameter.device, parameter.dtype)


def _check_heads(model: DynamicModel) -> None:
    """Run everything once on the meta device: every head must give (B, K) logits."""
    answers: list[tuple[int, ...] | str] = []

    def forward(images: Tensor) -> None:
        for logits in model.run_every_exit(images).logits:
            answers.append(tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__)

    expected = (BATCH, model.num_classes)
    try:
        trace(model, model.config.input_size, BATCH, forward)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise HeadError(f"a head does not fit its boundary: {type(error).__name__}: {error}") from error
    for name, answer in zip(model.exits, answers, strict=False):
        if answer != expected:
            raise HeadError(
                f"the head of exit {name!r} answers {answer} where (B, K) = {expected} is needed; build it for "
                f"{model.num_classes} classes"
            )
