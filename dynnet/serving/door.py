"""What every server does with a request: an image of it, or words and a status; and what is answered.

A request's body is an image file (JPEG, PNG, WebP, ...). The answer is JSON: class, confidence, exit, macs, model.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np

from dynnet.deploy.manifest import NAME as MANIFEST
from dynnet.deploy.manifest import Manifest, digest_of_file
from dynnet.deploy.runner import Prediction
from dynnet.errors import DataError, InputError, RequestError
from dynnet.serving.images import prepared

LARGEST = 10 * 2**20  # bytes of a body


class Door:
    """Of one exported model.

    Args:
        manifest: of it.
        folder: where it lies.
        largest: bytes of a body.

    Attributes:
        version: of the model: the beginning of its manifest's SHA-256, so that two models behind one name are told
            apart.
    """

    def __init__(self, manifest: Manifest, folder: Path, largest: int = LARGEST) -> None:
        self._manifest, self._largest = manifest, largest
        self._names: tuple[str | int, ...] = manifest.class_names or tuple(range(manifest.classes))
        self.version = digest_of_file(folder / MANIFEST)[:12]

    def check(self, kind: str, length: int | None) -> None:
        """Look at a request before its body is read.

        Args:
            kind: its Content-Type.
            length: its Content-Length, if it says so.

        Raises:
            RequestError: it holds no image, or too large a one.
        """
        if kind and not kind.startswith(("image/", "application/octet-stream")):
            raise RequestError(f"the body is {kind!r}; send an image file, such as image/jpeg", 415)
        if length is not None and length > self._largest:
            raise RequestError(f"the body has {length} bytes, more than {self._largest}; send a smaller image", 413)

    def image(self, body: bytes) -> np.ndarray:
        """(C, H, W) of a body.

        Raises:
            RequestError: it is no image, or too large.
        """
        self.check("", len(body))
        try:
            return prepared(body, self._manifest.input_size, self._manifest.preparation).astype(self._manifest.dtype)
        except DataError as error:
            raise RequestError(str(error), 400) from error

    def answers(self, prediction: Prediction) -> list[dict[str, Any]]:
        """What each image of a batch is answered."""
        exits = (*self._manifest.exits, "end")
        return [
            {
                "class": self._names[number],
                "confidence": round(confidence, 6),
                "exit": exits[exit],
                "macs": macs,
                "model": self.version,
            }
            for number, confidence, exit, macs in zip(
                prediction.logits.argmax(1).tolist(),
                prediction.confidence.tolist(),
                prediction.exit.tolist(),
                prediction.macs.tolist(),
                strict=True,
            )
        ]


def missing(error: ImportError) -> InputError:
    """To be raised where a server's library is not there."""
    return InputError(f"{error.name} is not installed; `pip install dynnet[serve]` brings it")


def full() -> RequestError:
    """To be raised where too many requests wait."""
    return RequestError("the queue is full; come again in a second", 503)


def check_free(host: str, port: int) -> None:
    """
    Raises:
        InputError: somebody listens there already, or the address is not this machine's.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} of {host} cannot be had ({error}); choose another with --port") from None
