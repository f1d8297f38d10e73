"""Single weights set to zero, for good: masks that survive training, and patterns that hardware knows.

On dense hardware this saves no time; it saves what is written to disk (`dynnet.save(..., sparse=True)`), and with two
zeros in every four neighbours (2:4) time on GPUs that have sparse tensor cores.

    O outputs and I inputs of a layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from dynnet.backbone.batches import Batches, Loader, Loss
from dynnet.backbone.layers.table import by_output, weighing_kind
from dynnet.backbone.masks import Masked, is_masked
from dynnet.backbone.names import check_excluded, is_inside, title
from dynnet.backbone.owners import holders
from dynnet.errors import PruneError
from dynnet.pruning.bare import check_bare
from dynnet.pruning.criteria.weights import score_weights, weight_of

SparsityScope = Literal["global", "layer"]
Schedule = Literal["linear", "cubic"]


def sparsify_(
    model: nn.Module,
    sparsity: float,
    loader: Loader | None = None,
    *,
    criterion: str = "magnitude",
    scope: SparsityScope = "global",
    exclude: Sequence[str] = (),
    batches: int = 10,
    loss: Loss | None = None,
    seed: int = 0,
) -> None:
    """Mask the least needed weights of convolutions and linear layers, in place.

    The masks hold through training, `state_dict` and copies; `make_permanent_` writes the zeros into the weights. Masks
    only grow: called again with a higher sparsity, what is masked stays so (iterative pruning).

    Args:
        model: any.
        sparsity: share of the weights that are zero then, exactly, to the nearest weight; of all of them ("global"), or
            of each layer's.
        loader: batches of (images, labels), for criteria that look at data.
        criterion: a name from `WEIGHT_CRITERIA`.
        scope: "global" ranks all weights together, "layer" those of each layer.
        exclude: modules, by name, whose weights stay.
        batches, loss, seed: as in `prune`.

    Raises:
        PruneError: a wrapped model, a sparsity outside [0, 1) or below what is masked already, an unknown name, or an
            activation asked of a layer whose own forward does not run; the model is left untouched.
    """
    if not 0 <= sparsity < 1:
        raise PruneError(f"sparsity={sparsity}: give a share of the weights in [0, 1)")
    if scope not in get_args(SparsityScope):
        raise PruneError(f"scope={scope!r}: choose from {', '.join(get_args(SparsityScope))}")
    check_bare(model, masked=True)
    layers = weighted_layers(model, exclude)
    given = Batches(loader, batches, loss or nn.functional.cross_entropy, seed)
    scores = score_weights(model, layers, criterion, given)
    for layer, values in scores.items():
        values[~_mask(model.get_submodule(layer))] = -torch.inf
    parts = [layers] if scope == "global" else [[layer] for layer in layers]
    masks: dict[str, Tensor] = {}
    for part in parts:
        joined = torch.cat([scores[layer].flatten() for layer in part])
        count, already = round(sparsity * len(joined)), int(joined.isneginf().sum())
        if count < already:
            raise PruneError(
                f"sparsity={sparsity:g}, but {already / len(joined):.4f} of the weights of {_named(part)} are masked "
                f"already, and masks only grow; give more"
            )
        keep = torch.ones_like(joined, dtype=torch.bool)
        keep[joined.topk(count, largest=False).indices] = False
        sizes = [scores[layer].numel() for layer in part]
        masks |= {layer: m.view_as(scores[layer]) for layer, m in zip(part, keep.split(sizes), strict=True)}
    set_masks_(model, masks)


def sparsify_n_m_(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    loader: Loader | None = None,
    *,
    criterion: str = "magnitude",
    exclude: Sequence[str] = (),
    batches: int = 10,
    loss: Loss | None = None,
    seed: int = 0,
) -> list[str]:
    """Mask all but the n most needed of every m neighbouring inputs of each output, in place (Mishra et al.,
    "Accelerating Sparse Deep Neural Networks", https://arxiv.org/abs/2104.08378).

    Args:
        model: any.
        n, m: of m neighbours along the inputs, n stay.
        loader, criterion, exclude, batches, loss, seed: as in `sparsify_`.

    Returns:
        Layers that are left dense, as m does not divide their inputs (of one group, where they are grouped).

    Raises:
        PruneError: a wrapped model, not 0 < n < m, an unknown name, layers that are masked already, or none that m
            divides.
    """
    if not 0 < n < m:
        raise PruneError(f"n={n}, m={m}: of m neighbours n stay, 0 < n < m")
    check_bare(model)
    layers = weighted_layers(model, exclude)
    modules = {layer: model.get_submodule(layer) for layer in layers}
    fits = [name for name, layer in modules.items() if by_output(layer, weight_of(layer)).shape[1] % m == 0]
    if not fits:
        raise PruneError(f"{title(model)} has no layer whose inputs are a multiple of m={m}; choose another")
    given = Batches(loader, batches, loss or nn.functional.cross_entropy, seed)
    masks = {}
    for layer, values in score_weights(model, fits, criterion, given).items():
        along = by_output(modules[layer], values).movedim(1, -1).unflatten(-1, (-1, m))  # (O, ..., I / m, m)
        keep = torch.zeros_like(along, dtype=torch.bool).scatter_(-1, along.topk(n, -1).indices, True)
        masks[layer] = by_output(modules[layer], keep.flatten(-2).movedim(-1, 1)).contiguous()
    set_masks_(model, masks)
    return [layer for layer in layers if layer not in masks]


def set_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on layers, in the place of those that they have.

    Args:
        model: any; changed in place.
        masks: by layer, bool in the shape of its weight; False is zero.
    """
    for name, mask in masks.items():
        layer: Any = model.get_submodule(name)
        if is_masked(layer):
            layer.parametrizations.weight[0].mask.copy_(mask)
        else:
            register_parametrization(layer, "weight", Masked(mask))
            layer.parametrizations.train(layer.training)


def make_permanent_(model: nn.Module) -> None:
    """Write the zeros into the weights and take the masks away, in place."""
    for module in list(model.modules()):
        if is_masked(module):
            remove_parametrizations(module, "weight", leave_parametrized=True)


def rewind_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a masked model the weights that it had earlier, in place; masks stay (lottery tickets: Frankle & Carbin,
    https://arxiv.org/abs/1803.03635, to the first ones; https://arxiv.org/abs/1912.05671, to early ones).

    Args:
        model: masked or not.
        weights: a copy of its `state_dict` that was made earlier, before or after it was masked
            (`copy.deepcopy(model.state_dict())`: what `state_dict` gives changes with the model).

    Raises:
        PruneError: it has other tensors, or they are the model's own, which were never earlier.
    """
    moved = {}
    for name, tensor in model.state_dict().items():
        plain = name.replace("parametrizations.weight.original", "weight")
        if name.endswith("parametrizations.weight.0.mask"):
            continue
        found = weights.get(name, weights.get(plain))
        if found is None or found.shape != tensor.shape:
            raise PruneError(f"the earlier weights lack {plain!r} of shape {tuple(tensor.shape)}; give the model's own")
        if found.numel() and found.data_ptr() == tensor.data_ptr():
            raise PruneError(
                f"{plain!r} of the earlier weights is the model's own, as it is now; keep "
                f"copy.deepcopy(model.state_dict()), which does not change with the model"
            )
        moved[name] = found
    model.load_state_dict(moved, strict=False)


def sparsity(model: nn.Module) -> dict[str, float]:
    """Share of zeros among the weights of every convolution and linear layer, and of all of them under ""."""
    zeros, sizes = {}, {}
    for name in weighted_layers(model, ()):
        weight = cast(Tensor, model.get_submodule(name).weight)
        zeros[name], sizes[name] = int((weight == 0).sum()), weight.numel()
    return {name: zeros[name] / sizes[name] for name in zeros} | {"": sum(zeros.values()) / max(1, sum(sizes.values()))}


def scheduled(schedule: Schedule, final: float, step: int, steps: int) -> float:
    """The sparsity after `step` of `steps`: "linear", or "cubic", fast at first (Zhu & Gupta,
    https://arxiv.org/abs/1710.01878).

    Raises:
        PruneError: an unknown schedule, or not 0 <= step <= steps.
    """
    if steps < 1 or not 0 <= step <= steps:
        raise PruneError(f"step={step}, steps={steps}: give 0 <= step <= steps, of 1 or more")
    if schedule not in get_args(Schedule):
        raise PruneError(f"schedule={schedule!r}: choose from {', '.join(get_args(Schedule))}")
    left = 1 - step / steps
    return final * (1 - (left if schedule == "linear" else left**3))


def to_semi_structured_(model: nn.Module) -> list[str]:
    """Let linear layers whose weights are 2:4 run on sparse tensor cores, in place, where the GPU has them.

    Returns:
        Names of the layers that now do: in half precision or int8, on a CUDA device of capability 8.0 or higher, with
        rows and columns in multiples of what its cores take (a classifier seldom has them). The others stay.
    """
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not isinstance(layer.weight, nn.Parameter):
            continue  # a mask makes the weight, say
        if not _has_sparse_cores(layer.weight):
            continue
        if layer.weight.shape[1] % 4 or int((layer.weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) > 2:
            continue
        try:
            packed = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        except RuntimeError:
            continue  # of a shape that the cores do not take: multiples of 16 or 64, by the type
        layer.weight = nn.Parameter(packed, requires_grad=False)
        found.append(name)
    return found


def weighted_layers(model: nn.Module, exclude: Sequence[str]) -> list[str]:
    """Names of all convolutions and linear layers, but for those inside of `exclude`, and for those that standardise
    their weights before they use them: a zero would not be one there.

    Raises:
        PruneError: an unknown name, nothing is left, or two of them have one weight.
    """
    modules = dict(model.named_modules())
    check_excluded(exclude, modules, title(model), PruneError)
    found = [
        name
        for name, module in modules.items()
        if (kind := weighing_kind(module)) and kind.weights_as_they_are(module) and not is_inside(name, exclude)
    ]
    if not found:
        raise PruneError(f"{title(model)} has no convolutions or linear layers to prune")
    held = holders(model)
    for name in found:
        if len(places := held[id(weight_of(modules[name]))]) > 1:
            one, other = (place.module or "the model itself" for place in places[:2])
            raise PruneError(
                f"{one} and {other} share their weights, so that they cannot have masks each; exclude them"
            )
    return found


def _mask(layer: nn.Module) -> Tensor:
    if is_masked(layer):
        return cast(Tensor, cast(Any, layer).parametrizations.weight[0].mask)
    return torch.ones_like(weight_of(layer), dtype=torch.bool)


def _has_sparse_cores(weight: Tensor) -> bool:
    halves = (torch.float16, torch.bfloat16, torch.int8)
    return weight.is_cuda and weight.dtype in halves and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def _named(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else "all layers"
