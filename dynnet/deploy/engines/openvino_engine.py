"""OpenVINO on the CPU: stages as ONNX graphs, compiled for a few numbers of rows.

A graph that is compiled for any number of rows is slow for a single one, and rows that only fill a batch up cost as
much as others. So a batch runs in parts of 16, 4 and 1 rows, of which there are never more than three graphs in memory,
whatever sizes come: docs/measured.md.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynnet.errors import ExportError

# `import openvino` tells its makers of it over the network, and writes into the home folder, unless the package that
# does so is missing. It stays hidden: parts of openvino look for it only later.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402

SUFFIX = ".onnx"
SIZES = (16, 4, 1)  # rows of a part


def lower(stage: Any, tensors: Sequence[Any], path: Path) -> None:
    """Write a stage as ONNX, which OpenVINO reads, in one file.

    Raises:
        ExportError: an operator has no ONNX form, or packages are not installed.
    """
    _writer().lower(stage, tensors, path)


def quantize(path: Path, batches: Iterable[Sequence[np.ndarray]], stage: Any, first: bool) -> None:
    """Write the file of a stage anew, in int8. OpenVINO reads what ONNX Runtime's tools write, and answered nearer to
    float with it than with what NNCF writes (tf_efficientnet_lite0).

    Raises:
        ExportError: it cannot be quantized, or packages are not installed.
    """
    _writer().quantize(path, batches, stage, first)


def _writer() -> Any:
    """What writes files that OpenVINO reads, and is not needed to run them."""
    try:
        from dynnet.deploy.engines import onnxruntime_engine
    except ImportError as error:
        raise ExportError(f"exporting to ONNX wants more packages ({error}); `pip install dynnet[openvino]`") from error
    return onnxruntime_engine


@functools.cache
def _core() -> openvino.Core:
    """One for all stages, which is never given back.

    Its plugin puts a stack of its own, for handlers of signals, in place of that of the thread that loads it, and takes
    it away when it goes. Where there are several, one that is gone may stay in place, and the next signal ends the
    process. So it is loaded by a thread that lives for this alone.
    """
    core = openvino.Core()
    loading = threading.Thread(target=core.get_property, args=("CPU", "FULL_DEVICE_NAME"))
    loading.start()
    loading.join()
    return core


class OpenVinoSession:
    """A stage in OpenVINO, in single precision; safe in threads, which wait for each other."""

    def __init__(self, path: Path, threads: int | None, stage: Any) -> None:
        self._name = path.name
        self._takes, self._gives = tuple(stage.takes), tuple(stage.gives)
        self._dims = (0, 0, *(port.dim for port in stage.gives))  # of the batch, in what it makes
        # Left to itself, it computes in half precision where the processor does.
        self._config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            self._config["INFERENCE_NUM_THREADS"] = threads
        self._core = _core()
        self._requests: dict[int, Any] = {}
        self._lock = threading.Lock()
        try:
            # It is held, and compiled when a size first comes: the file may be another one by then.
            self._model = self._core.read_model(path)
            self._request(1)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot read {str(path)!r}: {' '.join(str(error).split())[:300]}") from error

    def run(self, tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = tensors[0].shape[self._takes[0].dim] // self._takes[0].per_sample
        with self._lock:
            made = [self._run(tensors, start, size) for start, size in parts(rows)]
        whole = made[0]
        if len(made) > 1:
            pieces = zip(zip(*made, strict=True), self._dims, strict=True)
            whole = [np.concatenate(piece, dim) for piece, dim in pieces]
        return self._honest(tensors, whole, rows)

    def _honest(self, tensors: Sequence[np.ndarray], made: list[np.ndarray], rows: int) -> list[np.ndarray]:
        """What was made, NaN for rows that were fed NaN: OpenVINO's activations make numbers of it, and confidence."""
        broken = np.zeros(rows, bool)
        for tensor, port in zip(tensors, self._takes, strict=True):
            # A sum is quickly told, and NaN if anything in it is.
            if tensor.dtype.kind == "f" and np.isnan(tensor.sum()):
                of_rows = np.moveaxis(np.isnan(tensor), port.dim, 0).reshape(rows, -1)
                broken |= of_rows.any(1)
        if broken.any():
            entries = (1, 1, *(port.per_sample for port in self._gives))
            for out, dim, each in zip(made, self._dims, entries, strict=True):
                if out.dtype.kind == "f":
                    np.moveaxis(out, dim, 0)[broken.repeat(each)] = np.nan
        return made

    def _run(self, tensors: Sequence[np.ndarray], start: int, size: int) -> list[np.ndarray]:
        """What it makes of some rows."""
        fed = []
        for tensor, port in zip(tensors, self._takes, strict=True):
            index = [slice(None)] * tensor.ndim
            index[port.dim] = slice(start * port.per_sample, (start + size) * port.per_sample)
            fed.append(np.ascontiguousarray(tensor[tuple(index)]))
        request = self._request(size)
        request.infer(fed, share_inputs=True)
        return [request.get_output_tensor(number).data.copy() for number in range(len(self._dims))]

    def _request(self, size: int) -> Any:
        """For so many rows."""
        if size not in self._requests:
            shapes = {}
            for given, port in zip(self._model.inputs, self._takes, strict=True):
                shape = given.get_partial_shape()
                shape[port.dim] = size * port.per_sample
                shapes[given] = shape
            self._model.reshape(shapes)
            self._requests[size] = self._core.compile_model(self._model, "CPU", self._config).create_infer_request()
        return self._requests[size]


def parts(rows: int) -> Iterator[tuple[int, int]]:
    """A batch in parts of the sizes that there are: where each begins, and its rows.

    >>> list(parts(37))
    [(0, 16), (16, 16), (32, 4), (36, 1)]
    """
    start = 0
    for size in SIZES:
        while rows - start >= size:
            yield start, size
            start += size


def open_stage(path: Path, threads: int | None, stage: Any) -> OpenVinoSession:
    return OpenVinoSession(path, threads, stage)


def versions() -> Mapping[str, str]:
    return {"openvino": openvino.__version__.split("-")[0]}
