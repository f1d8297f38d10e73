"""Let the C allocator keep what activations free.

With glibc's defaults every large activation is mapped from the kernel anew and page-faulted in, which costs a CPU
forward 10 to 30% and hits models the harder the less they compute. Programs that time or train call this first, for
both sides of every comparison.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Serve large blocks from a heap that is never trimmed; tells whether the C library took it (glibc does)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**28}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
