"""int8 for inference on CPUs: weights and inputs of convolutions and linear layers as bytes, after training.

Every layer is replaced by one that turns its input into bytes, multiplies bytes (oneDNN's kernels, which torch ships)
and gives floating-point numbers, so that timm's own forward, exits and hooks run on as they are. Weights have a scale
for each output, inputs one scale and one zero point, measured on a few batches. MACs are counted as before.

x86 kernels without VNNI add products of bytes in pairs, in 16 bits: where they overflow, inputs get half as many steps.
A file runs on either.

    O outputs, I inputs of a layer
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from dynnet.backbone.batches import Batches, Loader
from dynnet.backbone.hooks import reading
from dynnet.backbone.layers.table import weighing_kind
from dynnet.backbone.masks import not_plain
from dynnet.backbone.modes import evaluating
from dynnet.backbone.names import check_excluded, is_inside, put_, title
from dynnet.deploy.folding import fold, is_hooked, whole_run
from dynnet.errors import CheckpointError, DataError, NonFiniteError, QuantizeError
from dynnet.model import DynamicModel, every_layer

M = TypeVar("M", bound=nn.Module)

# What a kernel gives: plain numbers, with nothing behind it.
_FLOAT: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
_LEVELS = 255  # of an input; weights have 127 on each side of zero


class Int8Layer(nn.Module):
    """What int8 convolutions and linear layers share.

    Attributes:
        weight_int8: (O, I / groups, ...) int8.
        weight_scale: (O,) what one step of a weight is worth.
        bias: (O,), zero where the layer had none.
        input_scale, input_zero: what one step of an input is worth, and which of 0 .. 255 is zero.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_scale: Tensor
    input_zero: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, low: float, high: float) -> None:
        super().__init__()
        with torch.no_grad():
            weight = layer.weight.detach().float()
            scale = (weight.abs().flatten(1).amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            steps = (weight / _by_output(scale, weight)).round().clamp(-127, 127)
            # Zero is among the inputs: padding is.
            low, high = min(low, 0.0), max(high, 0.0)
            step = max((high - low) / _LEVELS, torch.finfo(torch.float32).tiny)
            self.register_buffer("weight_int8", steps.to(torch.int8))
            self.register_buffer("weight_scale", scale)
            bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().clone()
            self.register_buffer("bias", bias)
            self.register_buffer("input_scale", torch.tensor(step))
            self.register_buffer("input_zero", torch.tensor(round(-low / step), dtype=torch.int32))
        self._packed: dict[tuple[int, ...], tuple[Tensor, Tensor, float, int]] = {}

    @property
    def weight(self) -> Tensor:
        """(O, I / groups, ...) float: what the bytes stand for. Some of timm's forwards ask for its type."""
        return self.weight_int8 * _by_output(self.weight_scale, self.weight_int8)

    def _bytes(self, x: Tensor, scale: float, zero: int) -> Tensor:
        """The nearest steps."""
        # What is added before the cut to whole numbers rounds.
        return torch.add(torch.tensor(zero + 0.5), x.float(), alpha=1 / scale).clamp_(0, _levels()).to(torch.uint8)

    def _ready(self, x: Tensor) -> tuple[Tensor, Tensor, float, int]:
        """For an input like x: weights in the kernel's own layout, zero points of the weights, scale and zero point of
        the input."""
        key = tuple(x.shape[1:])  # of which the best layout depends
        if key not in self._packed:
            coarser = _LEVELS / _levels()
            scale, zero = float(self.input_scale) * coarser, round(int(self.input_zero) / coarser)
            zeros = torch.zeros(len(self.weight_int8), dtype=torch.int32)
            self._packed[key] = (self._pack(list(x.shape), scale, zero), zeros, scale, zero)
        return self._packed[key]

    def _pack(self, shape: list[int], scale: float, zero: int) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Layer:
        self._packed = {}
        super()._apply(fn, recurse)
        # Kernels take these in single precision, whatever the rest of the model is in.
        self.weight_scale, self.input_scale = self.weight_scale.float(), self.input_scale.float()
        self.bias = self.bias.float()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # opaque to copies and files: packed anew where it runs


class Int8Conv2d(Int8Layer):
    """A convolution of bytes, (B, I, H, W) to (B, O, H', W') float."""

    def __init__(self, layer: nn.Conv2d, low: float, high: float) -> None:
        super().__init__(layer, low, high)
        self.stride, self.padding, self.dilation = list(layer.stride), list(layer.padding), list(layer.dilation)
        self.groups, self.kernel_size, self.same = layer.groups, layer.kernel_size, isinstance(layer, Conv2dSame)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        padding: Any = [0, 0] if self.same else self.padding
        shape = (self.stride, padding, self.dilation, self.groups)
        if x.device.type == "meta":  # a dry run, which counts what this multiplies
            return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), *shape)
        weight, zeros, scale, zero = self._ready(x)
        given = self._bytes(x, scale, zero).contiguous(memory_format=torch.channels_last)
        made = torch.ops.onednn.qconv_pointwise(
            given, scale, zero, weight, self.weight_scale, zeros, self.bias, *shape, *_FLOAT
        )
        return cast(Tensor, made).to(x.dtype)

    def _pack(self, shape: list[int], scale: float, zero: int) -> Tensor:
        padding = [0, 0] if self.same else self.padding
        packed = torch.ops.onednn.qconv_prepack(
            self.weight_int8, self.weight_scale, scale, zero, self.stride, padding, self.dilation, self.groups, shape
        )
        return cast(Tensor, packed)


class Int8Linear(Int8Layer):
    """A linear layer of bytes, (..., I) to (..., O) float."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "meta":
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        weight, zeros, scale, zero = self._ready(x)
        given = self._bytes(x, scale, zero)
        made = torch.ops.onednn.qlinear_pointwise(
            given, scale, zero, weight, self.weight_scale, zeros, self.bias, *_FLOAT
        )
        return cast(Tensor, made).to(x.dtype)

    def _pack(self, shape: list[int], scale: float, zero: int) -> Tensor:
        return cast(Tensor, torch.ops.onednn.qlinear_prepack(self.weight_int8, None))


@functools.cache
def _levels() -> int:
    """Steps of an input above its least that the kernels of this machine add up without overflow."""
    count = 64
    weight = torch.full((count, count), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zeros = torch.ones(count), torch.zeros(count, dtype=torch.int32)
    given = torch.full((1, count), _LEVELS, dtype=torch.uint8)
    made = torch.ops.onednn.qlinear_pointwise(given, 1.0, 0, packed, scales, zeros, None, *_FLOAT)
    return _LEVELS if bool((made == float(_LEVELS * 127 * count)).all()) else _LEVELS // 2


def _by_output(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


def quantize(
    model: M,
    loader: Loader,
    *,
    batches: int = 10,
    exclude: Sequence[str] = (),
    input_size: tuple[int, int, int] | None = None,
) -> M:
    """A copy for inference on a CPU, with batch norms folded and layers in int8.

    >>> import timm, torch
    >>> model = timm.create_model("cifar_resnet20").eval()
    >>> small = quantize(model, [torch.randn(16, 3, 32, 32)], input_size=(3, 32, 32))
    >>> len(int8_layers(small)), small(torch.randn(2, 3, 32, 32)).shape
    (22, torch.Size([2, 10]))

    Args:
        model: a wrapped model without gates, or any module from (B, C, H, W) images to logits; in float32, on a CPU.
        loader: batches of (images, ...), shuffled, on which the range of every layer's inputs is measured.
        batches: how many of them, at most.
        exclude: modules, by name, that stay in floating point.
        input_size: (C, H, W); by default what the model was made for.

    Returns:
        The copy, in eval mode; it can be saved, but not trained. Depthwise convolutions, layers of other kinds than
        plain convolutions and linear layers, and those whose weights something else uses as well, stay as they are. A
        byte cannot be NaN: images with NaN get an answer.

    Raises:
        QuantizeError: gates, masks on weights, int8 layers, another device or type, an unknown module, or nothing to
            quantize.
        DataError: an empty loader.
        NonFiniteError: a layer is given NaN or infinity.
    """
    if int8_layers(model):
        raise QuantizeError("the model is in int8 already; quantize the one that it was made from")
    if told := not_plain(model):
        raise QuantizeError(told)
    first = next(model.parameters(), None)
    if isinstance(model, DynamicModel) and model.gates is not None:
        raise QuantizeError("gates choose among floating-point weights; quantize a model without gates")
    if first is None or first.device.type != "cpu" or first.dtype != torch.float32:
        raise QuantizeError("int8 kernels are for CPUs, from float32: move the model with .cpu().float() first")
    small = fold(model, input_size)
    modules = dict(small.named_modules())
    whole = f"the wrapped {title(small.backbone)}" if isinstance(small, DynamicModel) else title(small)
    check_excluded(exclude, modules, whole, QuantizeError)
    owners = whole_run(small, input_size).owners
    stay = {*owners.others, *owners.fused, *(name for name in modules if is_inside(name, exclude))}
    layers = {name: module for name, module in modules.items() if _is_plain(module) and name not in stay}
    if not layers:
        raise QuantizeError("there are no plain convolutions or linear layers to quantize")
    put_int8_(small, _ranges(small, layers, loader, batches))
    return small


def int8_layers(model: nn.Module) -> list[str]:
    """Names of the layers that are in int8."""
    return [name for name, module in model.named_modules() if isinstance(module, Int8Layer)]


def put_int8_(model: nn.Module, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Put int8 layers where floating-point ones are, in place.

    Args:
        model: in eval mode.
        ranges: the least and the largest input of each layer, by name.

    Raises:
        CheckpointError: it has no such plain layer; nothing has changed then.
    """
    modules = dict(model.named_modules())
    if missing := [name for name in ranges if not isinstance(modules.get(name), (nn.Conv2d, nn.Linear))]:
        raise CheckpointError(f"it has no convolution or linear layer {missing[0]!r}")
    for name, (low, high) in ranges.items():
        layer = modules[name]
        kind: Any = Int8Conv2d if isinstance(layer, nn.Conv2d) else Int8Linear
        replacement = kind(layer, low, high).eval()
        for attribute in ("in_features", "out_features", "in_channels", "out_channels"):
            if hasattr(layer, attribute):
                setattr(replacement, attribute, getattr(layer, attribute))
        put_(model, name, replacement)


def _is_plain(module: nn.Module) -> bool:
    """Of a kind whose forward is known, and which nobody listens to."""
    kind = weighing_kind(module)
    if is_hooked(module) or not isinstance(module, (nn.Conv2d, nn.Linear)) or kind is None:
        return False
    if not kind.is_plain(module):
        return False
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    # A depthwise convolution has little to multiply: bytes cost it more than they save.
    return kind.effect(module) == "weighs"


@torch.no_grad()
def _ranges(
    model: nn.Module, layers: Mapping[str, nn.Module], loader: Loader, batches: int
) -> dict[str, tuple[float, float]]:
    """The least and the largest input of every layer that ran, each the mean over batches: what one image has beyond it
    is cut off."""
    seen: dict[str, list[tuple[float, float]]] = {}

    def look(name: str, x: Tensor) -> None:
        low, high = x.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise NonFiniteError(f"{name} is given NaN or infinity; check the weights and the images")
        seen.setdefault(name, []).append((float(low), float(high)))

    run = every_layer(model)
    with reading(layers, look), evaluating(model):
        for images, _ in Batches(loader, batches).on(model, labelled=False):
            run(images)
    if not seen:
        raise DataError("no layer ran on the loader's images")
    means = {name: torch.tensor(found, dtype=torch.float64).mean(0).tolist() for name, found in seen.items()}
    return {name: (low, high) for name, (low, high) in means.items()}
