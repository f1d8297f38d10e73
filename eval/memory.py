"""Memory of a process that does nothing but run an exported model."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import re, sys
import numpy as np
from dynnet.deploy import Runner
folder, threads, size, calls = sys.argv[1], *map(int, sys.argv[2:])
runner = Runner(folder, threads)
images = np.random.default_rng(0).standard_normal((size, *runner.manifest.input_size)).astype(runner.manifest.dtype)
for _ in range(calls):
    runner.predict(images)
    runner.at([np.inf] * len(runner.exits)).predict(images)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # rusage would count the parent's too
"""


@functools.cache
def peak_memory(folder: Path, threads: int, size: int, calls: int = 5) -> float:
    """Mebibytes at the peak, everything included, in a process of its own, without torch: batches of noise are answered
    as thresholds say, and all the way to the end.

    Args:
        folder: that `dynnet.export` wrote.
        threads: of the engine.
        size: of a batch.
        calls: of each kind.
    """
    command = [sys.executable, "-c", _PROGRAM, str(folder), *map(str, (threads, size, calls))]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(told) / 1024  # of kibibytes
