"""`wrap`: check everything, rehearse on the meta device, then attach exits to a backbone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dynnet.backbone.dry_run import BATCH, Trace, trace
from dynnet.backbone.input_size import input_size_of
from dynnet.backbone.modes import learning
from dynnet.backbone.names import check_fields, title
from dynnet.channels.finding import find_groups
from dynnet.config import WrapConfig
from dynnet.errors import ExitError, ForwardError, HeadError
from dynnet.exits import flow
from dynnet.exits.boundaries import Boundary, Places
from dynnet.exits.confidence import check_classes, make_measure
from dynnet.exits.heads import ExitHead, HeadFactory
from dynnet.exits.rehearsal import Placement, place
from dynnet.gates import attaching
from dynnet.gates.plan import GateConfig, GatePlan, check_gates
from dynnet.gates.planning import plan_gates
from dynnet.gates.widths import plan_widths
from dynnet.model import DynamicModel
from dynnet.outputs import only_logits


def wrap(
    backbone: nn.Module,
    exits: WrapConfig | int | Sequence[str | float] | None = None,
    *,
    heads: HeadFactory | None = None,
    **fields: Any,
) -> DynamicModel:
    """Give a backbone exits. Its forward is not rewritten; `model.unwrap()` gives it back as it came.

    >>> import timm, torch
    >>> backbone = timm.create_model("cifar_resnet20", num_classes=10)
    >>> model = wrap(backbone, exits=["layer1", 0.7])  # module names, shares of the MACs, or how many
    >>> model.exits
    ('layer1', 'layer2')
    >>> prediction = model.eval().predict(torch.randn(4, 3, 32, 32))
    >>> prediction.logits.shape, prediction.exit.tolist()  # with thresholds at inf nobody leaves yet
    (torch.Size([4, 10]), [2, 2, 2, 2])

    Args:
        backbone: any timm classifier, or module from (B, C, H, W) images to (B, K) logits.
        exits: as in `WrapConfig`; or the whole configuration.
        heads: builds a head of your own: called with a `Boundary` and K, gives a module from the boundary's output to
            (B, K) logits, or None where one shall be fitted to the features, as by default all are.
        fields: the fields of `WrapConfig`, in place of the configuration's. `gates="channel"` stands for a `GateConfig`
            with its defaults; `confidence` may be a callable from (B, K) logits to (B,) numbers.

    Returns:
        A model in the backbone's mode, on its device, with all thresholds at inf: nobody leaves yet.

    Raises:
        ExitError: an exit that cannot stand where it was asked for; the backbone is left untouched.
        GateError: nothing to gate, and why; the backbone is left untouched.
        HeadError: a head that does not answer with (B, K) logits; the backbone is left untouched.
        ThresholdError: no such measure of confidence, or one that a single logit tells nothing.
        UnsupportedError: in train mode the backbone answers with more than its logits; it is left untouched.
    """
    config, confidence = _settled(backbone, exits, fields)
    assert config.input_size is not None
    places = Places(backbone, config.input_size)
    check_classes(make_measure(confidence, 0), places.num_classes, title(backbone))
    _check_training(places)
    placement = _placed(places, config)
    config = replace(config, exits=tuple(boundary.name for boundary in placement.exits))
    plan = None if config.gates is None else _plan(places, placement.exits, config.gates)
    modules = [_head(boundary, places, config, heads) for boundary in placement.exits]
    measure = make_measure(confidence, len(placement.exits))
    model = DynamicModel(backbone, modules, placement, config, places.num_classes, measure, plan)
    _attach(model, placement)
    if heads is None:
        _tell_dear_heads(model)
    return model


def _settled(
    backbone: nn.Module, exits: WrapConfig | int | Sequence[str | float] | None, fields: Mapping[str, Any]
) -> tuple[WrapConfig, Any]:
    """The whole configuration, with an input size, and the confidence that was asked for; both checked on their own."""
    if is_wrapped(backbone):
        raise ExitError(f"{title(backbone)} is wrapped already; call unwrap() first")
    given = dict(fields)
    if exits is not None and not isinstance(exits, WrapConfig):
        given["exits"] = exits if isinstance(exits, (int, str)) or not isinstance(exits, Sequence) else tuple(exits)
    base = exits if isinstance(exits, WrapConfig) else WrapConfig()
    check_fields(given, WrapConfig, "wrap()", ExitError, ["heads"])
    confidence = given.get("confidence", base.confidence)
    given |= {"confidence": make_measure(confidence, 0).name, "gates": check_gates(given.get("gates", base.gates))}
    config = replace(base, **given)
    if not isinstance(config.head_share, (int, float)) or not 0 < config.head_share < 1:
        raise HeadError(f"head_share={config.head_share}: give a share of the backbone's MACs in (0, 1), such as 0.03")
    size = tuple(config.input_size or input_size_of(backbone))
    if len(size) != 3:
        raise ExitError(f"input_size={config.input_size}: give (C, H, W), such as (3, 224, 224)")
    return replace(config, input_size=size), confidence


def _check_training(places: Places) -> None:
    """Refuse a backbone that has heads which run in training only, and answers with theirs as well.

    Raises:
        UnsupportedError: it does.
    """
    answers: list[Any] = []

    def forward(twin: nn.Module, images: Tensor) -> None:
        with learning(twin):
            answers.append(twin(images))

    if places.trace.owners.unread():
        with contextlib.suppress(ForwardError):  # it does not run on images alone
            trace(places.twin, places.input_size, BATCH, forward)
    for answer in answers:
        only_logits(answer, places.backbone)


def _placed(places: Places, config: WrapConfig) -> Placement:
    """Boundaries at which rows can leave.

    Raises:
        ExitError: there are none, or none such.
    """
    placement = place(places, config.exits)
    if placement.problem is not None:
        raise ExitError(
            f"rows cannot leave {title(places.backbone)} at {[b.name for b in placement.exits]}: {placement.problem}; "
            f"choose other exits"
        )
    return placement


def _attach(model: DynamicModel, placement: Placement) -> None:
    """Put hooks on the backbone, and try everything once; the backbone is left untouched where that fails."""
    backbone = model.backbone
    if model.gates is not None:
        _beside(model.gates, backbone)
        attaching.attach(backbone, model.tag, model.gates.plan)
    flow.attach(backbone, model.tag, placement.exits, placement.companions)
    try:
        model.learn_size(model.input_size, _try_heads(model), placement.noted)
    except BaseException:
        model.unwrap()
        raise


def _tell_dear_heads(model: DynamicModel) -> None:
    """Warn of fitted heads that could not be had for what they may cost."""
    ledger, share = model.ledger(), model.config.head_share
    prices = {name: macs / ledger.dense for name, macs in zip(model.exits, ledger.heads, strict=True)}
    dear = {name: price for name, price in prices.items() if price > 2 * share}
    if dear:
        told = ", ".join(f"{price:.1%} at {name!r}" for name, price in dear.items())
        warnings.warn(
            f"even the narrowest heads for {model.num_classes} classes cost {told} of the backbone's MACs, more than "
            f"twice head_share={share:g}; give a larger head_share=, which they can make use of, or heads= of your own",
            stacklevel=3,
        )


def is_wrapped(model: nn.Module) -> bool:
    """Is it a wrapped model, or the backbone of one?"""
    return isinstance(model, DynamicModel) or flow.is_attached(model) or attaching.is_attached(model)


def _head(boundary: Boundary, places: Places, config: WrapConfig, heads: HeadFactory | None) -> nn.Module:
    """Somebody's own, or one that is fitted."""
    own = None if heads is None else heads(boundary, places.num_classes)
    if own is not None:
        return _checked(own, places.backbone, boundary)
    budget = config.head_share * places.trace.macs
    head = ExitHead(boundary, places.num_classes, places.last_grid, budget, config.head_blocks)
    return _beside(head, places.backbone)


def _plan(places: Places, boundaries: Sequence[Boundary], config: GateConfig) -> GatePlan:
    backbone = places.backbone
    groups = find_groups(places.twin, places.input_size, [b.name for b in boundaries])
    if config.widths:
        return plan_widths(places, boundaries, groups, config, places.trace.owners.fused)
    unheard = {
        call.name: f"the first dimension in {call.name} is not the batch"
        for call in places.trace.calls
        if any(leaf.batch_dim != 0 or not leaf.together for leaf in call.leaves)
    } | places.trace.owners.fused
    modules = dict(backbone.named_modules())
    return plan_gates(groups, config, places.trace.layers, places.trace.macs, modules, unheard, title(backbone))


def _checked(head: Any, backbone: nn.Module, boundary: Boundary) -> nn.Module:
    if not isinstance(head, nn.Module):
        raise HeadError(f"the head for exit {boundary.name!r} is a {type(head).__name__}; build a torch.nn.Module")
    return _beside(head, backbone)


def _beside(module: nn.Module, backbone: nn.Module) -> nn.Module:
    """On the backbone's device, in its type."""
    parameter = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    return module if parameter is None else module.to(parameter.device, parameter.dtype)


def _try_heads(model: DynamicModel) -> Trace:
    """A dry run of everything, in which every head must give (B, K) logits."""
    answers: list[tuple[int, ...] | str] = []

    def forward(twin: DynamicModel, images: Tensor) -> None:
        for logits in twin.run_every_exit(images).logits:
            answers.append(tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__)

    expected = (BATCH, model.num_classes)
    try:
        seen = trace(model, model.input_size, BATCH, forward)
    except ForwardError as error:
        raise HeadError(f"a head does not fit its boundary: {error}") from error
    for name, answer in zip(model.exits, answers, strict=False):
        if answer != expected:
            raise HeadError(
                f"the head of exit {name!r} answers {answer} where (B, K) = {expected} is needed; build it for "
                f"{model.num_classes} classes"
            )
    return seen
