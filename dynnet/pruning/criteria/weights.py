"""How much a single weight matters: one number for each, large for what should stay.

O outputs and I inputs of a layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynnet.backbone.batches import Batches
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.backbone.hooks import reading
from dynnet.backbone.layers.table import by_output, channel_dim
from dynnet.backbone.masks import is_masked
from dynnet.backbone.modes import evaluating
from dynnet.errors import NonFiniteError, PruneError, did_you_mean

Weights = Mapping[str, Tensor]


def score_weights(model: nn.Module, layers: Sequence[str], criterion: str, batches: Batches) -> dict[str, Tensor]:
    """Score every weight of some layers, in eval mode.

    Args:
        model: left as it was.
        layers: names of convolutions and linear layers.
        criterion: a name from `WEIGHT_CRITERIA`.
        batches: what data-driven criteria look at.

    Returns:
        By layer, one float for each weight, not negative.

    Raises:
        PruneError: an unknown criterion.
        NonFiniteError: a score is NaN or infinite.
        DataError: as in `Batches.on`.
    """
    if criterion not in WEIGHT_CRITERIA:
        raise PruneError(
            f"no criterion {criterion!r} for single weights{did_you_mean(criterion, WEIGHT_CRITERIA)}; choose from "
            f"{', '.join(WEIGHT_CRITERIA)}"
        )
    weights = {layer: weight_of(model.get_submodule(layer)) for layer in layers}
    with evaluating(model), right_gradients(at_risk(model)):
        found = WEIGHT_CRITERIA[criterion](model, weights, batches)
    for layer, scores in found.items():
        if not bool(scores.isfinite().all()):
            bad = int((~scores.isfinite()).sum())
            raise NonFiniteError(
                f"criterion {criterion!r} gave NaN or infinity for {bad} of the {scores.numel()} weights of {layer}; "
                f"check the weights, the images and the loss"
            )
    return found


def weight_of(layer: nn.Module) -> Tensor:
    """The parameter that holds a layer's weights, (O, I, ...); what a mask hides is still in it."""
    weight = cast(Any, layer).parametrizations.weight.original if is_masked(layer) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def magnitude(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """|w|."""
    return {layer: w.detach().abs() for layer, w in weights.items()}


def taylor(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """|g w|, mean over batches: to first order, what the loss would change without the weight."""
    slopes = _mean_over_batches(model, weights, batches, torch.abs)
    return {layer: slopes[layer] * w.detach().abs() for layer, w in weights.items()}


def fisher(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """g^2 w^2 / 2, mean over batches: the empirical Fisher information, of batches rather than of single samples, in
    place of the second derivative."""
    squares = _mean_over_batches(model, weights, batches, torch.square)
    return {layer: squares[layer] * w.detach().to(squares[layer].dtype).square() / 2 for layer, w in weights.items()}


def hessian(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """|h w^2 / 2| (optimal brain damage, LeCun et al., 1989)."""
    return {
        layer: (h * weights[layer].detach().to(h.dtype).square() / 2).abs()
        for layer, h in curvature(model, weights, batches).items()
    }


@torch.no_grad()
def activation(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """|w| times the L2 norm of the input that it weighs (Wanda, Sun et al., https://arxiv.org/abs/2306.11695)."""
    layers = {layer: model.get_submodule(layer) for layer in weights}
    squares: dict[str, Tensor] = {}

    def look(layer: str, x: Tensor) -> None:
        dim = channel_dim(layers[layer], x)
        squares[layer] = squares.get(layer, 0) + x.float().square().sum([d for d in range(x.ndim) if d != dim])

    with reading(layers, look):
        for images, _ in batches.on(model, labelled=False):
            model(images)
    if unseen := [layer for layer in weights if layer not in squares]:
        raise PruneError(
            f"the forward of {unseen[0]} does not run, so that nothing is known of its inputs; exclude it, or choose "
            f"another criterion than 'activation'"
        )
    found = {}
    for layer, w in weights.items():
        norms = squares[layer].sqrt()  # (I,)
        rows = by_output(layers[layer], w.detach().abs())  # (O, I / groups, ...)
        groups = len(norms) // rows.shape[1]
        by_row = norms.view(groups, 1, -1).expand(groups, len(rows) // groups, -1).flatten(0, 1)  # (O, I / groups)
        found[layer] = by_output(layers[layer], rows * by_row.view(*by_row.shape, *[1] * (w.ndim - 2)))
    return found


def at_random(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """The baseline that every criterion has to beat."""
    generator = torch.Generator().manual_seed(batches.seed)
    return {layer: torch.rand(w.shape, generator=generator).to(w.device) for layer, w in weights.items()}


WEIGHT_CRITERIA: dict[str, Callable[[nn.Module, Weights, Batches], dict[str, Tensor]]] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "fisher": fisher,
    "hessian": hessian,
    "activation": activation,
    "random": at_random,
}


def curvature(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """The diagonal of the loss's Hessian, by Hutchinson's estimate v * Hv with v = +-1, one draw a batch."""
    tensors = list(weights.values())
    found = _sums(tensors)
    generator = torch.Generator().manual_seed(batches.seed)
    count = 0
    with _differentiable(tensors):
        for images, labels in batches.on(model, labelled=True):
            assert labels is not None
            # Fused attention has no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                loss = batches.loss_of(model(images), labels)
                slopes = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
                draws = [
                    (torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w.device, w.dtype) for w in tensors
                ]
                along = torch.autograd.grad(slopes, tensors, draws, materialize_grads=True)
            for h, v, hv in zip(found, draws, along, strict=True):
                h += v * hv.detach()
            count += 1
    return {layer: h / max(count, 1) for layer, h in zip(weights, found, strict=True)}


def _mean_over_batches(
    model: nn.Module, weights: Weights, batches: Batches, of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The mean of a function of the gradients."""
    tensors = list(weights.values())
    found = _sums(tensors)
    count = 0
    with _differentiable(tensors):
        for images, labels in batches.on(model, labelled=True):
            assert labels is not None
            with torch.enable_grad():
                loss = batches.loss_of(model(images), labels)
                gradients = torch.autograd.grad(loss, tensors, materialize_grads=True)
            for total, gradient in zip(found, gradients, strict=True):
                total += of(gradient.to(total.dtype))
            count += 1
    return {layer: total / max(count, 1) for layer, total in zip(weights, found, strict=True)}


def _sums(weights: Sequence[Tensor]) -> list[Tensor]:
    """Zeros to add to, in single precision or better: squares of halves vanish."""
    return [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    before = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        yield
    finally:
        for w, was in zip(weights, before, strict=True):
            w.requires_grad_(was)
