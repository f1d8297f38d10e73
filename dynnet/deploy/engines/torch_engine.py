"""PyTorch: stages as graphs of its own operators, on a GPU where there is one, and there compiled by torch.compile.

The first batch of a stage compiles it, which takes seconds; one of a single sample compiles it once more. On a CPU, and
where no compiler is installed, graphs run as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynnet.deploy.engines.torch_graphs import read_graph, write_graph
from dynnet.errors import ExportError

SUFFIX = ".safetensors"


def lower(stage: Any, tensors: Sequence[Any], path: Path) -> None:
    """Write a stage as weights and a list of operators.

    Raises:
        ExportError: it holds an operator that no file may name.
    """
    write_graph(stage.graph, path)


def quantize(path: Path, batches: Iterable[Sequence[np.ndarray]], stage: Any, first: bool) -> None:
    """
    Raises:
        ExportError: always.
    """
    raise ExportError("engine 'torch' has no int8; export for onnxruntime or openvino")


class TorchSession:
    """A stage in PyTorch; safe in threads.

    Args:
        threads: of a run, on the CPU; None leaves PyTorch its own number.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._graph = read_graph(path, self._device)
        self._compiled: Any = torch.compile(self._graph, dynamic=True) if _gains(self._device) else None
        self._threads = threads

    @torch.no_grad()
    def run(self, tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
        before = torch.get_num_threads()  # of this thread of Python's: others have their own
        try:
            torch.set_num_threads(self._threads or before)
            made = self._made([torch.from_numpy(tensor).to(self._device) for tensor in tensors])
            return [tensor.cpu().numpy() for tensor in made]
        finally:
            torch.set_num_threads(before)

    def _made(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        compiled = self._compiled
        if compiled is not None:
            try:
                return compiled(*tensors)
            except Exception as error:  # of the compiler's, or of the graph's own
                made = self._graph(*tensors)
                self._compiled = None
                told = " ".join(str(error).split())[:300]
                warnings.warn(
                    f"torch.compile failed, and a stage runs as it is, more slowly: {type(error).__name__}: {told}",
                    stacklevel=4,
                )
                return made
        return self._graph(*tensors)


def _gains(device: torch.device) -> bool:
    """Is it worth to compile? On a CPU it gained 5% at most, for minutes of compiling."""
    return device.type == "cuda"


def open_stage(path: Path, threads: int | None, stage: Any) -> TorchSession:
    return TorchSession(path, threads)


def versions() -> Mapping[str, str]:
    return {"torch": torch.__version__.split("+")[0]}
