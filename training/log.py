"""What a run says while it goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dynnet.errors import CheckpointError
from dynnet.learning.processes import World


class Log:
    """log.jsonl, one record a line; TensorBoard too where it is installed.

    Args:
        out: folder of the run.
        size: bytes to keep of a log that is there already; what a dead run wrote after its last checkpoint is cut off.
            A log that is shorter is kept as far as it goes.
        here: only the first process writes.
    """

    def __init__(self, out: Path, size: int, here: World) -> None:
        self.path, self.size, self.here = out / "log.jsonl", size, here
        self.updates = 0

    def __enter__(self) -> Log:
        self.file, self.board = None, None
        if self.here.first:
            with self._told():
                self.file = self.path.open("a+b")
                self.file.truncate(self._kept(self.file))
                self.file.seek(0)
                self.updates = self.file.read().count(b"\n")  # and from here on `tell` is the file's length
            with contextlib.suppress(ImportError), self._told():
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.path.parent / "tensorboard"))
        return self

    def _kept(self, file: IO[bytes]) -> int:
        """Bytes of whole lines, up to the size wanted; the log may have been cut or lost since."""
        length = file.tell()
        file.seek(0)
        kept = file.read(min(self.size, length)).rfind(b"\n") + 1
        if kept < self.size:
            print(f"{self.path} is shorter than it was: it goes on behind its {kept} bytes", flush=True)
        return kept

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {str(self.path)!r}: {error.strerror or error}; the last checkpoint is whole: make room, "
                f"and go on with --resume"
            ) from error

    def __exit__(self, *_: object) -> None:
        for written in (self.file, self.board):
            if written is not None:
                with contextlib.suppress(OSError):  # every record was flushed, or told of
                    written.close()

    def write(self, record: dict[str, Any]) -> None:
        if self.file is None:
            return
        with self._told():
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
            self.updates += 1
            if self.board is not None and "stage" in record:
                for kind in ("losses", "accuracy"):
                    for i, value in enumerate(record.get(kind, [])):
                        self.board.add_scalar(f"{record['stage']}/{kind}/{i}", value, self.updates)

    def bytes(self) -> int:
        return self.file.tell() if self.file is not None else 0
