"""OpenVINO gets parts of few sizes, in single precision, and tells nobody of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dynnet.deploy.engines import openvino_engine
from dynnet.deploy.engines.openvino_engine import SIZES, OpenVinoSession, parts
from dynnet.deploy.manifest import Port
from dynnet.errors import ExportError

# Two rows a sample, and samples that lie in columns.
STAGE = SimpleNamespace(
    takes=(Port("a", 0, 1), Port("rows", 0, 2), Port("columns", 1, 1)), gives=(Port("r", 0, 2), Port("c", 1, 1))
)


@pytest.fixture
def session(tmp_path: Path) -> OpenVinoSession:
    nodes = [
        helper.make_node("Identity", ["a"], ["logits"]),
        helper.make_node("ReduceMax", ["a"], ["confidence"], axes=[1], keepdims=0),
        helper.make_node("Add", ["rows", "rows"], ["r"]),
        helper.make_node("Add", ["columns", "columns"], ["c"]),
    ]
    shapes = {"a": ["b", 4], "rows": ["2b", 3], "columns": [5, "b"]}
    shapes |= {"logits": ["b", 4], "confidence": ["b"], "r": ["2b", 3], "c": [5, "b"]}
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "stage", tensors[:3], tensors[3:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "a.onnx")
    return OpenVinoSession(tmp_path / "a.onnx", 1, STAGE)


def test_graphs_are_bounded_whatever_sizes_come(session: OpenVinoSession) -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 41):
        a, rows, columns = (rng.standard_normal(s, np.float32) for s in ((count, 4), (2 * count, 3), (5, count)))
        logits, confidence, r, c = session.run([a, rows, columns])
        for found, expected in ((logits, a), (confidence, a.max(1)), (r, 2 * rows), (c, 2 * columns)):
            np.testing.assert_array_equal(found, expected)
    assert set(session._requests) == set(SIZES)


def test_rows_of_nan_answer_nan_and_the_others_what_they_would(session: OpenVinoSession) -> None:
    """Left to itself it takes a maximum of NaN and numbers for a number, and is confident."""
    a, rows, columns = (np.ones(s, np.float32) for s in ((6, 4), (12, 3), (5, 6)))
    a[1, 2] = rows[7, 0] = columns[4, 5] = np.nan  # of samples 1, 3 and 5
    logits, confidence, r, c = session.run([a, rows, columns])
    broken = np.array([False, True, False, True, False, True])
    for found, value in ((logits, 1), (confidence, 1), (r.reshape(6, -1), 2), (c.T, 2)):
        of_rows = found.reshape(6, -1)
        assert np.isnan(of_rows[broken]).all()
        assert (of_rows[~broken] == value).all()


def test_parts_are_the_whole_batch() -> None:
    for rows in range(1, 70):
        assert [i for start, size in parts(rows) for i in range(start, start + size)] == list(range(rows))
        assert {size for _, size in parts(rows)} <= set(SIZES)


def test_it_computes_in_single_precision(session: OpenVinoSession) -> None:
    compiled = session._requests[1].get_compiled_model()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_what_it_cannot_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="OpenVINO cannot read '.*a.onnx'"):
        openvino_engine.open_stage(tmp_path / "a.onnx", 1, STAGE)


def test_nobody_is_told_of_its_use(tmp_path: Path) -> None:
    program = """
import socket, subprocess, sys
def no(*_, **__): raise SystemExit("it calls somebody")
socket.socket.connect = socket.getaddrinfo = no
import dynnet.deploy.engines.openvino_engine
assert sys.modules["openvino_telemetry"] is None
assert "torch" not in sys.modules and "onnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_handlers_of_signals_keep_their_stack() -> None:
    program = """
import ctypes, faulthandler, gc
from dynnet.deploy.engines.openvino_engine import _core
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
def stack():
    found = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.start, found.size
faulthandler.enable()
before = stack()
assert "CPU" in _core().available_devices
assert stack() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
