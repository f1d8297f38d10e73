"""What Python does behind one's back: files that are opened, servers and processes that are asked."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OUTSIDE = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "urllib.", "http.")
_CODE = (*sysconfig.get_paths().values(), str(Path(__file__).parents[1]), sys.prefix, sys.base_prefix)
_OWN = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime")  # what torch and Python ask of the machine

_listening: list[tuple[list[str], tuple[str, ...]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listening:
        return
    seen, named = _listening[-1]
    if event.startswith(_OUTSIDE):
        seen.append(f"{event}{arguments}")
    elif event == "open" and not isinstance(arguments[0], int):
        path = os.fsdecode(arguments[0])
        if not path.startswith((*_CODE, *_OWN, *named)):
            seen.append(f"open {path!r}")


sys.addaudithook(_hook)  # for good: Python does not take one back


@contextmanager
def watched(*named: Path) -> Iterator[list[str]]:
    """What happens meanwhile, beside imports: opened files other than those that are named, connections, processes."""
    seen: list[str] = []
    _listening.append((seen, tuple(map(str, named))))
    try:
        yield seen
    finally:
        _listening.pop()
