"""Functions called in a process of their own, with a limit of time and of memory: one that fails ends no other."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

# Processes are forked off one that has imported these, and nothing else: they are there at once, and hold no locks.
PRELOADED = ["eval.exportable"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)
_GIGABYTE = 2**30
_FAREWELL = 10  # seconds to end in, once everything was said


class CutShortError(Exception):
    """A call that came to no end: it took too long, wanted too much memory, or broke its process."""


def isolated(function: Callable[..., Any], arguments: Sequence[Any], seconds: float, gigabytes: float) -> Any:
    """What a function returns, called in a process of its own.

    Args:
        function: of a module; what it takes and returns can be pickled.
        arguments: of the function.
        seconds: that it may take,
        gigabytes: and those of memory.

    Raises:
        CutShortError: it came to no end, or raised something.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_bounded, args=(sender, gigabytes, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise CutShortError(f"it took more than {seconds:g} s")
        result, told = receiver.recv()
        process.join(_FAREWELL)
    except EOFError:
        process.join()
        raise CutShortError(f"its process ended with {process.exitcode}, within {gigabytes:g} GB") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if told is not None:
        raise CutShortError(told)
    return result


def _bounded(sender: Connection, gigabytes: float, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    bytes = int(gigabytes * _GIGABYTE)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes, bytes))  # what it writes to; weights that are only mapped are free
    try:
        sender.send((function(*arguments), None))
    except Exception as error:  # of any kind: it is told on the other side
        sender.send((None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
