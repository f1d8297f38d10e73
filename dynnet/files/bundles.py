"""Files that are whole or not there: safetensors with a JSON description in the header. Never pickles.

A file is written beside its place, flushed to disk and renamed, so a crash leaves the old one. Its header holds a
SHA-256 over all tensors and the description; a flipped bit is an error that names the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from dynnet.backbone.digest import digest_of
from dynnet.errors import CheckpointError, SchemaError
from dynnet.schema import parse

FORMAT = 2  # 1 did not say how images are prepared


def write_bundle(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able description to one file, all or nothing."""
    path = Path(path)
    # Safetensors refuses memory that is shared (tied weights) or strided (channels_last): each gets its own, in order.
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(about, sort_keys=True)
    header = {"dynnet": text, "format": str(FORMAT), "sha256": digest_of(own, text)}
    write_atomically(path, to_bytes(own, header))


def read_bundle(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that `write_bundle` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, not dynnet's, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is truncated or damaged ({error}); take another copy") from error
    if not {"dynnet", "format", "sha256"} <= header.keys():
        raise CheckpointError(f"{str(path)!r} is a safetensors file, but not one of dynnet's")
    if not header["format"].isdecimal() or int(header["format"]) < 1:
        raise CheckpointError(f"{str(path)!r} is damaged: its format is {header['format']!r}; take another copy")
    if int(header["format"]) > FORMAT:
        raise CheckpointError(
            f"{str(path)!r} has format {header['format']}, this dynnet reads up to {FORMAT}; upgrade dynnet"
        )
    if digest_of(tensors, header["dynnet"]) != header["sha256"]:
        raise CheckpointError(f"{str(path)!r} is damaged: its SHA-256 does not match; take another copy")
    try:
        about = parse(header["dynnet"])
        if not isinstance(about, dict):
            raise SchemaError("it is no mapping")
    except SchemaError as error:
        raise CheckpointError(f"{str(path)!r} is damaged: of what it says, {error}; take another copy") from error
    return tensors, about


def is_bundle(path: str | Path) -> bool:
    """Did `write_bundle` write this file?"""
    try:
        with safe_open(path, "pt") as file:
            return "dynnet" in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to disk, rename it.

    Raises:
        CheckpointError: it cannot be written; what was there before is whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(path)!r}: {error.strerror or error}; make room for it, or choose another folder"
        ) from error


def remove_half_written(folder: Path) -> None:
    """Remove what `write_atomically` was writing in a folder when its process was killed."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)
