"""Threads that wait soon sleep. To be told before torch starts its threads, so nothing of torch is imported here."""

from __future__ import annotations

import os


def sleep_soon() -> None:
    """Let OpenMP's threads spin for 1,000 turns, libgomp's count where there are more threads than cores, not 300,000.

    On a shared machine the one they wait for gets a core. Where the environment says how to wait, that is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
