"""ONNX Runtime: stages as ONNX graphs with a symbolic batch."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dynnet.errors import ExportError

SUFFIX = ".onnx"
_broken: set[str] = set()  # providers that this process cannot load, which are not tried for every stage again


def lower(stage: Any, tensors: Sequence[Any], path: Path) -> None:
    """Write a stage as ONNX.

    Raises:
        ExportError: an operator has no ONNX form, or the `onnx` packages are not installed.
    """
    import torch

    outputs = ["logits", "confidence", *(value.name for value in stage.gives)]
    free = tuple({value.dim: torch.export.Dim.DYNAMIC} for value in stage.takes)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                _attending_in_four(stage.graph),
                tuple(tensors),
                dynamo=True,
                dynamic_shapes=free,
                input_names=[value.name for value in stage.takes],
                output_names=outputs,
                verbose=False,
            )
        _take_in_blocks(program.model.graph)
        # Where in whose files an operator came from is for nobody else to know.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
        program.save(path)
    except ImportError as error:
        raise ExportError(f"exporting to ONNX wants more packages ({error}); `pip install dynnet[deploy]`") from error
    except Exception as error:  # of torch's exporter
        told = " ".join(str(error).split())
        raise ExportError(f"a stage cannot be written as ONNX: {type(error).__name__}: {told[:300]}") from error


def _attending_in_four(module: Any) -> Any:
    """A stage in which attention is over (B, heads, tokens, channels), as torch writes it in ONNX: of more dimensions,
    as nested windows have, the first ones are joined for it."""
    import torch

    attention = torch.ops.aten.scaled_dot_product_attention.default
    if all(node.target is not attention or node.meta["val"].ndim <= 4 for node in module.graph.nodes):
        return module
    module = copy.deepcopy(module)
    graph = module.graph
    for node in [node for node in graph.nodes if node.target is attention and len(node.args) == 3]:
        lead = node.args[0].meta["val"].shape[: node.meta["val"].ndim - 3]
        with graph.inserting_before(node):
            given = [graph.call_function(torch.ops.aten.flatten.using_ints, (x, 0, len(lead) - 1)) for x in node.args]
            made = graph.call_function(attention, tuple(given), dict(node.kwargs))
            back = graph.call_function(torch.ops.aten.unflatten.int, (made, 0, [-1, *lead[1:]]))
        node.replace_all_uses_with(back)
        graph.erase_node(node)
    module.recompile()
    return module


def _take_in_blocks(graph: Any) -> None:
    """Let features that a stage takes be brought into blocks of channels once, where ONNX Runtime has convolutions in
    them (NCHWc). It brings its inputs there for convolutions alone: a residual sum that reads the same features as they
    came would keep itself, and every sum after it, in the plain layout. A mean over one pixel changes no number, and is
    read by all."""
    import onnx_ir

    for given in list(graph.inputs):
        readers = list(given.uses())
        convolved = [use for use in readers if use.node.op_type == "Conv" and use.idx == 0]
        if given.shape is None or len(given.shape) != 4 or not convolved or len(convolved) == len(readers):
            continue
        mean = onnx_ir.node("AveragePool", [given], {"kernel_shape": [1, 1]}, version=graph.opset_imports.get(""))
        (taken,) = mean.outputs
        taken.name, taken.shape, taken.type = f"{given.name}_taken", given.shape, given.type
        for use in readers:
            use.node.replace_input_with(use.idx, taken)
        graph.insert_before(next(iter(graph)), mean)


def quantize(path: Path, batches: Iterable[Sequence[np.ndarray]], stage: Any, first: bool) -> None:
    """Write the file of a stage anew, in int8; see `onnxruntime_int8`.

    Raises:
        ExportError: it cannot be quantized, or the `onnx` package is not installed.
    """
    try:
        from dynnet.deploy.engines import onnxruntime_int8
    except ImportError as error:
        raise ExportError(f"int8 wants more packages ({error}); `pip install dynnet[deploy]`") from error
    onnxruntime_int8.quantize(path, batches, stage, first)


class OnnxSession:
    """A stage in ONNX Runtime; safe in threads."""

    def __init__(self, path: Path, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or _processors()
        # Every stage has threads of its own, and only one works at a time: they shall not wait at full speed. (One pool
        # for all would do the same, but no other session of the process could have its own any more.)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _share_memory(options)
        wanted = _providers()
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=wanted)
        except Exception as error:  # of its own kinds
            raise ExportError(
                f"ONNX Runtime cannot read {str(path)!r}: {' '.join(str(error).split())[:300]}"
            ) from error
        _tell_of(set(wanted) - set(self._session.get_providers()))
        self._names = [given.name for given in self._session.get_inputs()]

    def run(self, tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(self._session.run(None, dict(zip(self._names, tensors, strict=True))))


def _share_memory(options: Any) -> None:
    """Let a session take its memory from one pool for all stages, of which one works at a time: each with a pool of its
    own would hold as much as it ever needed. Sessions that do not ask for the pool are left alone."""
    _register_pool()
    options.add_session_config_entry("session.use_env_allocators", "1")


@functools.cache
def _register_pool() -> None:
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    where = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(where, None)


def open_stage(path: Path, threads: int | None, stage: Any) -> OnnxSession:
    return OnnxSession(path, threads)


def versions() -> Mapping[str, str]:
    return {"onnxruntime": onnxruntime.__version__}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _providers() -> list[str]:
    there = set(onnxruntime.get_available_providers())
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there - _broken]


def _tell_of(missing: set[str]) -> None:
    """ONNX Runtime itself goes on without, and says so to nobody but stderr."""
    if missing:
        _broken.update(missing)
        warnings.warn(
            f"ONNX Runtime could not load {', '.join(sorted(missing))}: stages run on the CPU. What it lacks stands on "
            f"stderr; install that, or `onnxruntime` in place of `onnxruntime-gpu`",
            stacklevel=5,
        )


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter tells its own developers many things."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
