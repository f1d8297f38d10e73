"""An exported model behind LitServe: dynamic batches in one or several processes of one machine.

    from dynnet.serving.lit_serve import server
    server("stages").run(port=8000)

`python -m dynnet.serving stages --server litserve` does that. Wants `pip install dynnet[serve]`.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import litserve
import numpy as np
from fastapi import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynnet.deploy import Runner
from dynnet.errors import RequestError
from dynnet.serving.door import LARGEST, Door, full
from dynnet.serving.http import received, refusal, response


class Answering(litserve.LitAPI):
    """What one process does."""

    def __init__(self, folder: Path, threads: int, batch: int, wait_ms: float) -> None:
        waiting = wait_ms / 1e3 if batch > 1 else 0.0
        super().__init__(max_batch_size=batch, batch_timeout=waiting)
        self._folder, self._threads = folder, threads

    def setup(self, device: str) -> None:
        self._runner = Runner(self._folder, self._threads)
        self._door = Door(self._runner.manifest, self._folder)

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        try:
            return self._door.image(base64.b64decode(request["image"]))
        except RequestError as error:
            raise HTTPException(error.status, str(error)) from error

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> list[dict[str, Any]]:
        return self._door.answers(self._runner.predict(x if x.ndim == 4 else x[None]))

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: Any) -> Any:
        return output[0] if isinstance(output, list) else output


class Entrance:
    """Before LitServe, which takes JSON and queues without end: what is no image or too many at once is told."""

    def __init__(self, app: ASGIApp, door: Door, queue: int) -> None:
        self._app, self._door, self._free = app, door, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await self._app(scope, receive, send)
        request = Request(scope, receive)
        try:
            if request.method == "GET":
                return await response({"model": self._door.version})(scope, receive, send)
            body = await received(request, self._door)
            if not self._free:
                raise full()
        except RequestError as error:
            return await refusal(error)(scope, receive, send)
        self._free -= 1
        try:
            await self._app({**scope, "headers": _JSON}, _once(body), send)
        finally:
            self._free += 1
        return None


_JSON = [(b"content-type", b"application/json")]


def _once(body: bytes) -> Receive:
    message: Message = {"type": "http.request", "body": b'{"image": "%s"}' % base64.b64encode(body)}

    async def receive() -> Message:
        return message

    return receive


def server(
    folder: str | Path,
    *,
    replicas: int = 1,
    threads: int = 1,
    batch: int = 8,
    wait_ms: float = 2.0,
    queue: int = 100,
    largest: int = LARGEST,
) -> litserve.LitServer:
    """To be run; as `dynnet.serving.ray_serve.application`, on one machine.

    Raises:
        ExportError: there is no exported model, or it is damaged.
    """
    place = Path(folder)
    door = Door(Runner(place, threads).manifest, place, largest)
    return litserve.LitServer(
        Answering(place, threads, batch, wait_ms),
        accelerator="cpu",
        workers_per_device=replicas,
        restart_workers=True,
        middlewares=[(Entrance, {"door": door, "queue": queue + replicas * batch})],
    )
