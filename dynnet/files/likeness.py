"""Is a model that is to be saved what its file will make again? Its parts and settings, and its answer to an image."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from dynnet.backbone.modes import device_of, evaluating, somebodys_forward
from dynnet.backbone.names import is_inside
from dynnet.deploy.folding import FoldedNorm
from dynnet.errors import ForwardError, PruneError
from dynnet.pruning.shape import Shape, bring_into_shape_

# What modules of one class may differ in, though their tensors do not, so that their answers differ.
_SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "padding_mode"),
    *("eps", "negative_slope", "approximate", "num_heads"),
)


def other_parts(model: nn.Module, fresh: nn.Module, shape: Shape) -> str | None:
    """Where a model is not the pruned or folded form of a fresh one, in words; None where it is, or was only
    trained with other dropout.

    Args:
        model: to be saved.
        fresh: as timm makes it, without numbers; it is not fresh afterwards.
        shape: of the model beside it.
    """
    try:
        bring_into_shape_(fresh, shape)
    except PruneError as error:
        return str(error)
    mine, theirs = (dict(m.named_modules()) for m in (model, fresh))
    replaced = [name for name, module in mine.items() if isinstance(module, FoldedNorm)]
    for name in [*theirs, *(name for name in mine if name not in theirs)]:
        if is_inside(name, replaced):
            continue
        kinds = [_kind(modules[name]) if name in modules else None for modules in (mine, theirs)]
        if kinds[0] is not kinds[1]:
            told = ["nothing" if kind is None else f"a {kind.__name__}" for kind in kinds]
            return f"{name!r} is {told[0]}, there {told[1]}"
        for key in _SETTINGS:
            values = [getattr(modules[name], key, None) for modules in (mine, theirs)]
            if values[0] != values[1]:
                return f"{name!r} has {key}={values[0]}, there {values[1]}"
    tensors = model.state_dict()
    for name, there in fresh.state_dict().items():
        if name in tensors and tensors[name].shape != there.shape:
            return f"{name!r} has shape {tuple(tensors[name].shape)}, there {tuple(there.shape)}"
    return None


@torch.no_grad()
def other_answer(model: nn.Module, again: nn.Module, size: tuple[int, ...]) -> str | None:
    """Where a model answers an image otherwise than another one with the same tensors, in words; None where it does
    not, and where nobody can tell, for it takes no images of this size. What changes no tensor, a window say, shows in
    nothing else.

    Args:
        model, again: plain; the second goes to the first one's device.
        size: (C, H, W) of the image.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    image = image.to(device_of(model), weight.dtype)
    try:
        mine = _answer(model, image)
    except ForwardError:
        return None
    try:
        theirs = _answer(again.to(image.device), image)
    except ForwardError as error:
        return str(error)
    if mine.shape != theirs.shape:
        return f"it answers with shape {tuple(mine.shape)}, there {tuple(theirs.shape)}"
    # The same kernels on the same numbers, in another memory layout at most.
    rounding = max(1e-4, 64 * torch.finfo(weight.dtype).eps) * float(mine.nan_to_num().abs().max())
    if torch.allclose(mine, theirs, rtol=0, atol=rounding, equal_nan=True):
        return None
    return f"its answer to an image differs by up to {float((mine - theirs).abs().max()):.2g}"


def _answer(model: nn.Module, image: Tensor) -> Tensor:
    with evaluating(model), somebodys_forward(model):
        return model(image).double()


def _kind(module: nn.Module) -> type:
    """Its class; nothing happens in eval mode in any form of dropout."""
    return nn.Identity if isinstance(module, (nn.modules.dropout._DropoutNd, DropPath)) else type(module)
