"""Batch norm folded into the convolution before it, for inference.

In eval mode a batch norm is a scale and a shift per channel, which the weights and the bias of a convolution can carry
themselves. What a dry run shows to be read by the norm alone is folded; everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dynnet.backbone.dry_run import BATCH, Trace, trace
from dynnet.backbone.input_size import input_size_of
from dynnet.backbone.layers.table import is_batch_norm, known, weighing_kind
from dynnet.backbone.names import put_
from dynnet.backbone.twin import copy_of
from dynnet.deploy.one_width import at_widths
from dynnet.errors import CheckpointError
from dynnet.gates.attaching import GatedForward
from dynnet.gates.routers import Routers
from dynnet.model import DynamicModel

M = TypeVar("M", bound=nn.Module)


def fold(model: M, input_size: tuple[int, int, int] | None = None) -> M:
    """A copy for inference, without the batch norms that follow a convolution directly.

    >>> import timm, torch
    >>> model = timm.create_model("cifar_resnet20").eval()
    >>> images = torch.randn(2, 3, 32, 32)
    >>> torch.allclose(fold(model)(images), model(images), atol=1e-4)
    True

    Args:
        model: a wrapped model, or any module from (B, C, H, W) images to logits.
        input_size: (C, H, W); by default what the model was made for.

    Returns:
        The copy, in eval mode. Its answers are the same to rounding; it is not for training.
    """
    folded = copy_of(model).eval()
    if isinstance(folded, DynamicModel) and isinstance(folded.gates, Routers):
        _fold_widths_(folded, folded.gates, input_size)
    seen = _whole_run(folded, input_size)
    modules = dict(folded.named_modules())
    several = _of_several_widths(folded)
    for conv_name, norm_name in _pairs(seen, modules):
        if norm_name in several:
            continue
        conv, norm = modules[conv_name], cast(Any, modules[norm_name])
        assert isinstance(conv, nn.Conv2d)
        layout = torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        if layout is not None:
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
        put_(folded, norm_name, FoldedNorm(norm))
    return folded


def _fold_widths_(model: DynamicModel, gates: Routers, size: tuple[int, int, int] | None) -> None:
    """Give every module that runs once for each width narrow copies, folded, in place."""
    regions, copies = gates.plan.regions, [nn.ModuleList() for _ in gates.plan.containers]
    for width in range(len(regions[0].widths)):
        narrow = fold(at_widths(model, [width] * len(regions)), size).unwrap()
        for container, of_container in zip(gates.plan.containers, copies, strict=True):
            of_container.append(narrow.get_submodule(container.name))
    gates.copies = nn.ModuleList(copies)


def _of_several_widths(model: nn.Module) -> set[str]:
    """Batch norms that remember something else of every width, and stay."""
    gates = model.gates if isinstance(model, DynamicModel) else None
    return {f"backbone.{name}" for name in gates.plan.norms} if gates is not None else set()


def _whole_run(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Trace:
    """A dry run of a model, of a wrapped one with all of its exits; by default on the size that it was made for."""
    if isinstance(model, DynamicModel):
        return trace(model, input_size or model.input_size, BATCH, DynamicModel.run_every_exit)
    return trace(model, input_size or input_size_of(model), BATCH)


class FoldedNorm(nn.Sequential):
    """What stands where a batch norm was: the activation that timm's may hold, or nothing.

    Attributes:
        num_features: channels that pass.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(*(norm.get_submodule(part) for part in ("drop", "act") if hasattr(norm, part)))
        self.num_features = known(norm).widths(norm)[0]
        self.train(norm.training)


def folded_norms(model: nn.Module) -> list[str]:
    """Names of the batch norms that `fold` has left out."""
    return [name for name, module in model.named_modules() if isinstance(module, FoldedNorm)]


def fold_again_(model: nn.Module, norms: Sequence[str], tensors: Collection[str]) -> None:
    """Give a model the shape of a folded one, in place; its numbers mean nothing until they are loaded.

    Args:
        model: not folded yet.
        norms: as `folded_norms` gave them for the other.
        tensors: names in the other's state.

    Raises:
        CheckpointError: it has no such batch norm; nothing has changed then.
    """
    modules = dict(model.named_modules())
    found = {name: norm for name in norms if (norm := modules.get(name)) is not None and is_batch_norm(norm)}
    if missing := [name for name in norms if name not in found]:
        raise CheckpointError(f"it has no batch norm {missing[0]!r}")
    for name, norm in found.items():
        put_(model, name, FoldedNorm(norm))
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d) and module.bias is None and f"{name}.bias" in tensors:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))


def _pairs(seen: Trace, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """(convolution, norm) where the norm is the only reader of the convolution's output, and all that uses the weights
    of both are they themselves."""
    once = {name: call for name, call in seen.once().items() if name not in seen.owners.others}
    makers = {
        call.outputs[0]: call for call in once.values() if _is_conv(modules[call.name]) and len(call.outputs) == 1
    }
    found = []
    for index, call in enumerate(seen.calls):
        norm = modules[call.name]
        if call.name not in once or not is_batch_norm(norm) or _is_hooked(norm):
            continue
        maker = makers.get(call.inputs.get(0, -1))
        if maker is None or _is_hooked(modules[maker.name]):
            continue
        readers = {reader for _, reader in seen.lives[call.inputs[0]].readers}
        if readers == {index}:
            found.append((maker.name, call.name))
    return found


def _is_conv(module: nn.Module) -> bool:
    # A subclass may do something to its weights first (weight standardisation does).
    kind = weighing_kind(module)
    return kind is not None and isinstance(module, nn.Conv2d) and kind.is_plain(module)


def _is_hooked(module: nn.Module) -> bool:
    """Does somebody listen to a layer, or stand in for its forward, so that nothing else may take its place?"""
    instead = vars(module).get("forward")
    heard = module._forward_hooks or module._forward_pre_hooks
    return bool(heard) or (instead is not None and not isinstance(instead, GatedForward))
