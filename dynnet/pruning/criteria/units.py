"""How much a unit of channels matters: one number for each unit of each group, large for what should stay.

What a unit is worth is asked of all layers that it touches, so that channels that a residual sum ties are judged
together. A unit is *closed* when every layer that reads it sees zeros; the first- and second-order criteria estimate
what that would do to the loss. With m = 1 a factor on the unit's channels wherever they are read, g = dL/dm is the sum
over its readers of input times gradient:

    L(m = 0) - L(m = 1)  ~  -g + d2L/dm2 / 2

    B samples of a batch, C channels of a layer, U units of a group
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynnet.backbone.batches import Batches
from dynnet.backbone.dry_run import BATCH, trace
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.backbone.hooks import reading
from dynnet.backbone.layers.table import by_output, channel_dim, weighing_kind
from dynnet.backbone.modes import evaluating
from dynnet.channels.groups import Group, Member
from dynnet.errors import NonFiniteError, PruneError, did_you_mean
from dynnet.pruning.criteria.weights import curvature, weight_of

Scores = Sequence[Tensor | None]  # None where a criterion has nothing to say of a group


@dataclass(frozen=True)
class Criterion:
    """How units are scored.

    Attributes:
        score: called with the model, its groups and batches; gives (U,) float64 for each group, or None.
        comparable: are scores of different groups in one unit? Else each group's are divided by their mean.
    """

    score: Callable[[nn.Module, Sequence[Group], Batches], Scores]
    comparable: bool


def score(model: nn.Module, groups: Sequence[Group], criterion: str, batches: Batches) -> Scores:
    """Score all units of all groups, in eval mode.

    Args:
        model: whose groups they are; left as it was.
        groups: as `dynnet.channels.finding.find_groups` gives them.
        criterion: a name from `CRITERIA`.
        batches: what data-driven criteria look at.

    Returns:
        (U,) float64 for each group, on the CPU; None where the criterion has nothing to say of it.

    Raises:
        PruneError: an unknown criterion, or one that has nothing to say of any group.
        NonFiniteError: a score is NaN or infinite.
        DataError: as in `Batches.on`.
    """
    chosen = find_criterion(criterion)
    with evaluating(model), right_gradients(at_risk(model)):
        found = [None if s is None else s.detach().double().cpu() for s in chosen.score(model, groups, batches)]
    for group, scores in zip(groups, found, strict=True):
        if scores is not None and not bool(scores.isfinite().all()):
            bad = int((~scores.isfinite()).sum())
            raise NonFiniteError(
                f"criterion {criterion!r} gave NaN or infinity for {bad} of {len(scores)} units made by "
                f"{group.members[0].layer}; check the weights, the images and the loss"
            )
    if groups and all(scores is None for scores in found):
        raise PruneError(
            f"criterion {criterion!r} has nothing to say of any group; {_NOTHING.get(criterion, 'check the weights')}"
        )
    return found


def find_criterion(name: str) -> Criterion:
    """A criterion by its name.

    Raises:
        PruneError: there is none of that name.
    """
    if name not in CRITERIA:
        raise PruneError(f"no criterion {name!r}{did_you_mean(name, CRITERIA)}; choose from {', '.join(CRITERIA)}")
    return CRITERIA[name]


# By weights alone.


def magnitude(model: nn.Module, groups: Sequence[Group], batches: Batches, power: int) -> Scores:
    """The L1 or L2 norm of all weights that would go with a unit (Li et al., "Pruning Filters for Efficient ConvNets",
    https://arxiv.org/abs/1608.08710, there of the filters alone)."""

    def of(group: Group) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        for member, weight in _weights(model, group, ("produces", "reads", "passes")):
            total += _by_unit(member, weight.double().abs().pow(power).flatten(1).sum(1))
        return total.pow(1 / power)

    return [of(group) for group in groups]


def geometric_median(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
    """The sum of the distances to all other units of the group: the closer to their median, the easier replaced (FPGM,
    He et al., https://arxiv.org/abs/1811.00250)."""

    def of(group: Group) -> Tensor:
        square = torch.zeros(group.units, group.units, dtype=torch.float64)
        for member, weight in _weights(model, group, ("produces", "passes")):
            rows = weight.double().flatten(1).cpu()[torch.from_numpy(member.channels)].flatten(1)
            square += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        return square.sqrt().sum(1)

    return [of(group) for group in groups]


def norm_scale(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
    """The scale of the batch norms that channels pass (network slimming, Liu et al.,
    https://arxiv.org/abs/1708.06519)."""
    modules = dict(model.named_modules())

    def of(group: Group) -> Tensor | None:
        scales = [
            _by_unit(member, modules[member.layer].weight.abs())
            for member in group.members
            if isinstance(modules[member.layer], nn.modules.batchnorm._BatchNorm)
            and modules[member.layer].weight is not None
        ]
        return torch.stack(scales).mean(0) if scales else None

    return [of(group) for group in groups]


def at_random(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
    """The baseline that every criterion has to beat."""
    generator = torch.Generator().manual_seed(batches.seed)
    return [torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups]


# By what the data say.


def activation(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
    """Mean absolute value of a unit's channels where they are read."""
    means: dict[str, Tensor] = {}
    total = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
    seen = 0

    readers = _readers(model, groups)

    def look(layer: str, x: Tensor) -> None:
        dim = channel_dim(readers[layer], x)
        means[layer] = x.double().abs().mean([d for d in range(x.ndim) if d != dim])

    with torch.no_grad(), reading(readers, look):
        for images, _ in batches.on(model, labelled=False):
            model(images)
            for sums, group in zip(total, groups, strict=True):
                for member in _reading(group):
                    sums += _by_unit(member, means[member.layer]) * len(images)
            seen += len(images)
    return [sums / max(seen, 1) for sums in total]


def taylor(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
    """|g|, the first-order effect of closing a unit, mean over batches (Molchanov et al.,
    https://arxiv.org/abs/1611.06440 and https://arxiv.org/abs/1906.10771)."""
    total = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
    count = 0
    for slopes in _slopes(model, groups, batches):
        for sums, slope in zip(total, slopes, strict=True):
            sums += slope.sum(0).abs()
        count += 1
    return [sums / max(count, 1) for sums in total]


def fisher(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
    """E[g^2] / 2 over single samples: the empirical Fisher information in place of the second derivative (Theis et al.,
    https://arxiv.org/abs/1801.05787)."""
    total = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
    seen = 0
    for slopes in _slopes(model, groups, batches):
        for sums, slope in zip(total, slopes, strict=True):
            # The loss is a mean: a sample's own slope is B times as large.
            sums += (slope * len(slope)).square().sum(0)
        seen += len(slopes[0])
    return [sums / 2 / max(seen, 1) for sums in total]


def hessian(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
    """Sum of h w^2 / 2 over the weights w that read a unit, with h the diagonal of the loss's Hessian (optimal brain
    damage, LeCun et al., 1989; see `dynnet.pruning.criteria.weights.curvature`).

    A noisy estimate: for ResNet-20, two from 20 batches each rank the units of a group with a correlation of 0.4, where
    those of `fisher` have 0.9.
    """
    readers = _readers(model, groups)
    weights = {layer: weight_of(reader) for layer, reader in readers.items()}
    found = []
    saliency = {
        layer: by_output(readers[layer], 0.5 * h * weights[layer].detach().square())
        for layer, h in curvature(model, weights, batches).items()
    }
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for member in _reading(group):
            total += _by_unit(member, _columns(member, saliency[member.layer]).double().flatten(1).sum(1))
        # Noise of the estimate, and the bends of a loss that is not at a minimum, make some negative.
        found.append(total.abs())
    return found


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(partial(magnitude, power=1), comparable=False),
    "l2": Criterion(partial(magnitude, power=2), comparable=False),
    "taylor": Criterion(taylor, comparable=True),
    "fisher": Criterion(fisher, comparable=True),
    "hessian": Criterion(hessian, comparable=True),
    "activation": Criterion(activation, comparable=False),
    "slimming": Criterion(norm_scale, comparable=True),
    "fpgm": Criterion(geometric_median, comparable=False),
    "random": Criterion(at_random, comparable=False),
}
_NOTHING = {"slimming": "it looks at the scales of batch norms, and there are none on channels that can go"}


# What they share.


def _reading(group: Group) -> list[Member]:
    """Members that read, one for each layer."""
    return [member for member in group.members if member.role == "reads"]


def _weights(model: nn.Module, group: Group, roles: Sequence[str]) -> Iterator[tuple[Member, Tensor]]:
    """Weights with the channels of a member first, (C, ...)."""
    modules = dict(model.named_modules())
    for member in group.members:
        layer: Any = modules[member.layer]
        # Norms have their own criterion: their scales are of another size than weights are.
        if member.role in roles and weighing_kind(layer) is not None:
            weight = by_output(layer, layer.weight.detach())
            yield member, weight if member.role != "reads" else _columns(member, weight)


def _columns(member: Member, weight: Tensor) -> Tensor:
    """(C_in, ...) weights by the channel that they read, from (C_out, C_in / groups, ...)."""
    groups = member.width // weight.shape[1]
    parts = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return parts.flatten(0, 1)


def _by_unit(member: Member, vector: Tensor) -> Tensor:
    """(U,) sums of a (C,) vector over the channels of every unit."""
    return vector.detach().double().cpu()[torch.from_numpy(member.channels)].sum(1)


def _readers(model: nn.Module, groups: Sequence[Group]) -> dict[str, nn.Module]:
    """The layers that read the groups, by name."""
    return {layer: model.get_submodule(layer) for layer in sorted({m.layer for g in groups for m in _reading(g)})}


def _slopes(model: nn.Module, groups: Sequence[Group], batches: Batches) -> Iterator[list[Tensor]]:
    """For each batch, g of every sample by group: (B, U) float64; in a mean loss, so that samples add up."""
    readers = _readers(model, groups)
    places: dict[str, int | None] | None = None
    for images, labels in batches.on(model, labelled=True):
        assert labels is not None
        if places is None:
            places = _batch_dims(model, tuple(images.shape[1:]), readers)
        slopes = {}
        for layer, (x, gradient) in _at_inputs(model, readers, images, labels, batches).items():
            dim = channel_dim(readers[layer], x)
            slopes[layer] = _per_sample((x * gradient).double(), dim, places[layer], len(images)).cpu()
        yield [_over_readers(group, slopes, len(images)) for group in groups]


def _at_inputs(
    model: nn.Module, readers: Mapping[str, nn.Module], images: Tensor, labels: Tensor, batches: Batches
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each reader reads, and the gradient of the loss there."""
    inputs: dict[str, Tensor] = {}

    def look(layer: str, x: Tensor) -> Tensor:
        # Several layers may read one tensor; each slope is of one of them. Where all weights before it are frozen, the
        # graph begins here.
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        inputs[layer] = x
        return x

    with torch.enable_grad(), reading(readers, look):
        loss = batches.loss_of(model(images), labels)
        read = [inputs[layer] for layer in readers]
        gradients = torch.autograd.grad(loss, read, materialize_grads=True)
    return {layer: (x.detach(), slope) for layer, x, slope in zip(readers, read, gradients, strict=True)}


def _over_readers(group: Group, slopes: Mapping[str, Tensor], size: int) -> Tensor:
    """(B, U) sums over all layers that read a unit and over its channels, of (B, C) by layer."""
    total = torch.zeros(size, group.units, dtype=torch.float64)
    for member in _reading(group):
        total += slopes[member.layer][:, torch.from_numpy(member.channels)].sum(2)
    return total


def _batch_dims(model: nn.Module, input_size: tuple[int, ...], layers: Iterable[str]) -> dict[str, int | None]:
    """The dimension of each layer's output, and so of its input, that holds the samples."""
    wanted = set(layers)
    calls = trace(model, input_size, BATCH).calls
    return {call.name: call.leaves[0].batch_dim for call in calls if call.name in wanted}


def _per_sample(x: Tensor, dim: int, batch_dim: int | None, size: int) -> Tensor:
    """(B, C) sums of x over everything else; an equal share each where nobody can tell samples apart."""
    if batch_dim is None or batch_dim == dim or x.shape[batch_dim] % size:
        return (x.movedim(dim, -1).flatten(0, -2).sum(0) / size).expand(size, -1)
    # Windows and patches are folded into the batch sample by sample.
    return x.movedim((batch_dim, dim), (0, -1)).reshape(size, -1, x.shape[dim]).sum(1)
