"""The folder of a run: one run at a time works in it, and begins without what a killed one left half-written."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dynnet.errors import CheckpointError
from dynnet.files.bundles import remove_half_written
from dynnet.learning.processes import World

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"


@contextlib.contextmanager
def hold(out: Path, here: World) -> Iterator[None]:
    """Make the folder where it is not there, and keep other runs out of it as long as this one works there.

    The first of many processes holds it for all of them. The kernel lets go of it when that process dies. A folder in
    which nothing was written is gone afterwards.

    Raises:
        CheckpointError: another run holds it, or it cannot be written to.
    """
    if not here.first:
        yield
        return
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _lock(out / _LOCK)
        remove_half_written(out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write in {str(out)!r}: {error.strerror or error}; choose another --out"
        ) from error
    try:
        yield
    finally:
        # Still held: whoever opened this file meanwhile finds that it is no longer there, and looks again.
        with contextlib.suppress(OSError):
            (out / _LOCK).unlink()
            if new and not any(out.iterdir()):
                out.rmdir()
        os.close(lock)
        _held.discard(lock)


def _lock(path: Path) -> int:
    """An open file that holds a lock."""
    while True:
        if fcntl is None:
            lock = _create(path)
        else:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.stat().st_ino != os.fstat(lock).st_ino:
                    raise FileNotFoundError
            except BlockingIOError:
                os.close(lock)
                raise _busy(path) from None
            except FileNotFoundError:  # its holder ended between the two calls
                os.close(lock)
                continue
            except OSError:
                os.close(lock)
                raise
        _held.add(lock)
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return lock


def _create(path: Path) -> int:
    """Where nothing can be locked: the file itself says that somebody works here."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        raise _busy(path, f", or remove {str(path)!r} if it is dead") from None


def _busy(path: Path, more: str = "") -> CheckpointError:
    holder = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        holder = path.read_text().strip()
    return CheckpointError(
        f"{str(path.parent)!r} is in use by {holder or 'another process'}: wait for its end{more}, or choose another "
        f"--out"
    )


# Decoding processes outlive a killed run for some seconds; they do not hold its folder.
_held: set[int] = set()


def _let_go() -> None:
    for lock in _held:
        os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
