"""Stages of ONNX Runtime in int8: quantized after training, in ONNX's own QuantizeLinear and DequantizeLinear.

Features are bytes without a sign, with one step and one zero a tensor; weights have a step for each output. Kernels for
x86 without VNNI add products of bytes in pairs, in 16 bits, and cut off what is larger: 255 (v + w) has to fit. The
usual remedy is weights of 7 bits. But it is neighbours that are added, and few of them are both large and of one sign:
a step as coarse as they ask for is finer than 7 bits nearly everywhere. So a file is right wherever it runs.

What reads the images stays in float, and so do what makes the logits, and the confidence behind it, and routers: a few
of the multiply-adds, and what is lost in them is lost for good.

    O outputs of a layer, W weights of each
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from dynnet.errors import ExportError

_WEIGHED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What between such layers can be done on bytes too.
_BETWEEN = (
    "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Concat", "Split", "Pad", "Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize",
)  # fmt: skip


def quantize(path: Path, batches: Iterable[Sequence[np.ndarray]], stage: Any, first: bool) -> None:
    """Write the file of a stage anew, in int8.

    Args:
        path: of a stage in float.
        batches: what it takes.
        stage: what is in the file.
        first: it takes images.

    Raises:
        ExportError: it cannot be quantized.
    """
    model = onnx.load(path)
    _without_means_of_one_pixel(model.graph)
    _name_nodes(model.graph)
    router = _of_router(model.graph) if stage.route is not None else set()
    kept = {*router, *_behind_weights(model.graph), *(_before_weights(model.graph) if first else ())}
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = [given.name for given in model.graph.input]
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})  # or it asks for it
    # Norms of layers want floats: where they stand between all that is multiplied, sums that went through bytes on the
    # way to them are slower and less exact.
    normed = any(node.op_type == "LayerNormalization" and node.name not in router for node in model.graph.node)
    written = path.with_name(f"{path.name}.int8")
    try:
        quantize_static(
            model,
            written,
            _Reader(names, batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_WEIGHED, *(() if normed else _BETWEEN)],
            nodes_to_exclude=sorted(kept),
            per_channel=True,
            reduce_range=True,  # for weights of other shapes than those that are known here
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                # The mean of what batches reach: one image far beyond all others shall not make all steps coarser.
                "CalibMovingAverage": True,
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"] if normed else [],
                "TensorQuantOverrides": _steps([node for node in model.graph.node if node.name not in kept], weights),
            },
        )
        _tell_nothing(written)
        written.replace(path)
    except OSError:
        raise
    except Exception as error:  # of its own kinds
        told = " ".join(str(error).split())
        raise ExportError(f"{path.name} cannot be quantized: {type(error).__name__}: {told[:300]}") from error
    finally:
        written.unlink(missing_ok=True)


class _Reader(CalibrationDataReader):
    """Batches, as ONNX Runtime asks for them."""

    def __init__(self, names: Sequence[str], batches: Iterable[Sequence[np.ndarray]]) -> None:
        self._names, self._batches = names, iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(zip(self._names, batch, strict=True))


def _steps(nodes: Sequence[Any], weights: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """How far the bytes of each output's weights reach, as ONNX Runtime is told."""
    found = {}
    for node in nodes:
        weight = weights.get(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if weight is None or (node.op_type != "Conv" and weight.ndim != 2):
            continue
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        axis = 0 if node.op_type == "Conv" or turned else 1
        found[node.input[1]] = [
            {
                "axis": axis,
                "quant_type": QuantType.QInt8,
                "symmetric": True,
                "reduce_range": False,
                "rmin": -r,
                "rmax": r,
            }
            for r in reach(np.moveaxis(weight, axis, 0))
        ]
    return found


def reach(weight: np.ndarray) -> np.ndarray:
    """What 127 stands for, so that no two neighbours of one sign are more than 128 together, rounded.

    >>> reach(np.array([[1.0, -1.0, 0.2, 0.1], [0.5, 1.0, -0.1, 0.1]], np.float32))
    array([1. , 1.5], dtype=float32)

    Args:
        weight: (O, W) of a linear layer, or (O, I, H, W) of a convolution, with I inputs in a group.

    Returns:
        (O,) float32, 1 where all weights are zero.
    """
    widest = np.abs(weight).reshape(len(weight), -1).max(1)
    # In whichever order a kernel goes through them. Where a group has one input, kernels add in 32 bits.
    orders = [weight] if weight.ndim == 2 else [weight, np.moveaxis(weight, 1, -1)] if weight.shape[1] > 1 else []
    for order in orders:
        row = order.reshape(len(weight), -1)
        for part in (np.maximum(row, 0), np.maximum(-row, 0)):
            widest = np.maximum(widest, (part[:, 1:] + part[:, :-1]).max(1, initial=0))
    return np.where(widest > 0, widest, 1).astype(np.float32)


def _without_means_of_one_pixel(graph: Any) -> None:
    """What brings features into the layout of float kernels is of no use to those of bytes."""
    taken = {value.name for value in graph.output}
    for node in list(graph.node):
        shape = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        nothing = node.op_type == "AveragePool" and {*shape["kernel_shape"], *shape.get("strides", ())} == {1}
        if nothing and "pads" not in shape and node.output[0] not in taken:
            for reader in graph.node:
                for place, name in enumerate(reader.input):
                    if name == node.output[0]:
                        reader.input[place] = node.input[0]
            graph.node.remove(node)


def _name_nodes(graph: Any) -> None:
    """Nodes are told apart by their names."""
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"


def _behind_weights(graph: Any) -> set[str]:
    """Names of the nodes that make logits and confidence, back to the last that have weights, with them."""
    makers = {name: node for node in graph.node for name in node.output}
    wanted, found = [value.name for value in graph.output[:2]], set()
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            wanted += [] if node.op_type in _WEIGHED else node.input
    return found


def _of_router(graph: Any) -> set[str]:
    """Names of the nodes that only serve the last output, of which the largest number says how a sample goes on."""
    makers = {name: node for node in graph.node for name in node.output}
    wanted, others = [value.name for value in graph.output[:-1]], set()
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.name not in others:
            others.add(node.name)
            wanted += node.input
    return {node.name for node in graph.node} - others


def _before_weights(graph: Any) -> set[str]:
    """Names of the nodes that read the images, up to the first that have weights, with them."""
    reached, found = {graph.input[0].name}, set()
    for node in graph.node:  # each after what it reads
        if reached.intersection(node.input):
            found.add(node.name)
            reached.update(() if node.op_type in _WEIGHED else node.output)
    return found


def _tell_nothing(path: Path) -> None:
    """What the tools noted in the file is for nobody else to know."""
    model = onnx.load(path)
    for told in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del told.metadata_props[:]
        told.doc_string = ""
    onnx.save(model, path)
