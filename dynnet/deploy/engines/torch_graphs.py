"""A graph of PyTorch's operators as a file that is only data: weights and JSON, in safetensors.

`torch.export.save` is no such file: reading it unpickles what it says is a pickle, and evaluates texts. Here a file
names operators, and none but those that make tensors of tensors are believed.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from dynnet.errors import ExportError, SchemaError
from dynnet.schema import between, parse, typed

_KEY = "dynnet.graph"
_KINDS = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}
_ON_NUMBERS = {"getitem": operator.getitem, "mul": operator.mul, "floordiv": operator.floordiv,
               "add": operator.add, "sub": operator.sub}  # fmt: skip
# PyTorch says of some operators that they are its core, from which all others are made. These are for speed:
_MORE = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d addcmul avg_pool1d avg_pool2d
    avg_pool3d baddbmm batch_norm chunk clamp_min contiguous conv1d conv2d conv3d dropout einsum expand_as flatten
    floor_divide
    glu group_norm hardsigmoid hardswish hardtanh im2col instance_norm layer_norm linalg_vector_norm linear linspace
    log_softmax logsumexp masked_fill matmul max_pool1d max_pool2d max_pool3d meshgrid mish movedim narrow new_full
    new_ones new_zeros ones ones_like pad pixel_shuffle pixel_unshuffle prelu reshape rms_norm roll rsub
    scaled_dot_product_attention selu silu softmax softplus split square squeeze stack std swapaxes tile to transpose
    tril triu type_as unbind unflatten unfold upsample_bicubic2d upsample_bilinear2d upsample_nearest2d
    upsample_trilinear3d var var_mean view_as zeros zeros_like _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _unsafe_view _to_copy _softmax _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training
"""


@dataclass(frozen=True)
class Step:
    """A call. What it is given are plain values, lists of them, and mappings of one key: `value` (a number: first come
    what the graph takes, then steps in order), `tensor` (a name in the file), `number` (inf, -inf or nan), `dtype`,
    `memory_format`, `layout`, or `device`, which is where the graph runs."""

    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """What the JSON says."""

    format: Literal[1]
    takes: Annotated[int, between(1, 10_000)]
    steps: tuple[Step, ...]
    gives: tuple[Any, ...]


def write_graph(module: fx.GraphModule, path: Path) -> None:
    """Write a graph and its tensors.

    Raises:
        ExportError: an operator that no file may name.
    """
    numbers: dict[fx.Node, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    steps: list[Step] = []
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    gives: tuple[Any, ...] = ()
    for number, node in enumerate(inputs):
        numbers[node] = {"value": number}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            numbers[node] = {"tensor": str(node.target)}
            tensors[str(node.target)] = module.get_buffer(str(node.target)).detach().cpu().contiguous().clone()
        elif node.op == "call_function":
            name = next((name for name, call in _ON_NUMBERS.items() if call is node.target), str(node.target))
            _operator(name)
            kwargs = {key: _said(value, numbers) for key, value in node.kwargs.items()}
            steps.append(Step(name, tuple(_said(value, numbers) for value in node.args), kwargs))
            numbers[node] = {"value": len(inputs) + len(steps) - 1}
        elif node.op == "output":
            gives = tuple(_said(value, numbers) for value in node.args[0])
    said = json.dumps(asdict(Graph(1, len(inputs), tuple(steps), gives)), allow_nan=False)
    save_file(tensors, path, {_KEY: said})


def read_graph(path: Path, device: torch.device) -> fx.GraphModule:
    """Read it back. No name that a file gives gets into code.

    Raises:
        ExportError: it is no such file, or names what no file may name.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            graph = typed(Graph, parse((file.metadata() or {}).get(_KEY, "")))
            return _Reader(graph, {name: file.get_tensor(name) for name in file.keys()}, device).module()  # noqa: SIM118
    except (OSError, SafetensorError, SchemaError) as error:
        raise ExportError(f"{str(path)!r} is no graph of operators: {error}; export the model again") from error


class _Reader:
    """From what a file says to a graph that runs."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.said, self.tensors, self.device = graph, tensors, device
        self.graph, self.root = fx.Graph(), nn.Module()
        self.values = [self.graph.placeholder(f"taken_{number}") for number in range(graph.takes)]
        self.held: dict[str, fx.Node] = {}

    def module(self) -> fx.GraphModule:
        for step in self.said.steps:
            call, keys = _operator(step.operator)
            if unknown := [key for key in step.kwargs if key not in keys]:
                raise SchemaError(f"{step.operator} takes no {unknown[0]!r}")
            args = tuple(self.read(value) for value in step.args)
            kwargs = {key: self.read(value) for key, value in step.kwargs.items()}
            self.values.append(self.graph.call_function(call, args, kwargs))
        self.graph.output(tuple(self.read(value) for value in self.said.gives))
        return fx.GraphModule(self.root, self.graph).eval()

    def read(self, said: Any) -> Any:
        if isinstance(said, list | tuple):
            return [self.read(value) for value in said]
        if not isinstance(said, dict):
            return said
        if len(said) != 1:
            raise SchemaError(f"a value has the keys {sorted(said)}; expected one")
        ((kind, name),) = said.items()
        if kind == "value" and type(name) is int and 0 <= name < len(self.values):
            return self.values[name]
        if kind == "tensor" and name in self.tensors:
            return self.held_tensor(name)
        if kind == "number" and name in ("inf", "-inf", "nan"):
            return float(name)
        if kind in _KINDS and isinstance(getattr(torch, str(name), None), _KINDS[kind]):
            return getattr(torch, name)
        if kind == "device":
            return self.device
        raise SchemaError(f"a value is {kind} {name!r}, which there is not")

    def held_tensor(self, name: str) -> fx.Node:
        if name not in self.held:
            target = f"held_{len(self.held)}"
            self.root.register_buffer(target, self.tensors[name])
            # Each is asked for where it is first used; later uses come after it.
            self.held[name] = self.graph.get_attr(target)
        return self.held[name]


def _operator(name: str) -> tuple[Callable[..., Any], Sequence[str]]:
    """An operator by its name, and what it is given by name.

    Raises:
        ExportError: it is not among those that make tensors of tensors.
    """
    if name in _ON_NUMBERS:
        return _ON_NUMBERS[name], ()
    space, plain, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
    packet = getattr(torch.ops.aten, plain, None) if space == "aten" else None
    if isinstance(packet, torch._ops.OpOverloadPacket) and overload in packet.overloads():
        found = getattr(packet, overload)
        known = plain in _MORE.split() or any(torch.Tag.core in getattr(packet, o).tags for o in packet.overloads())
        if known and not found._schema.is_mutable:
            return found, [argument.name for argument in found._schema.arguments]
    raise ExportError(f"operator {name} is none that a file may name for the torch engine; choose engine='onnxruntime'")


def _said(value: Any, numbers: Mapping[fx.Node, dict[str, Any]]) -> Any:
    """A value as JSON says it."""
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, list | tuple):
        return [_said(one, numbers) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": None}
    for kind, of in _KINDS.items():
        if isinstance(value, of):
            return {kind: str(value).removeprefix("torch.")}
    raise ExportError(f"a graph holds a {type(value).__name__}, which no file can say; choose engine='onnxruntime'")
