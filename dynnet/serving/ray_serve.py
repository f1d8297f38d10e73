"""An exported model behind Ray Serve: replicas, dynamic batches, a bounded queue.

    from dynnet.serving.ray_serve import application
    ray.serve.run(application("stages", replicas=4), route_prefix="/predict")

`python -m dynnet.serving stages` does that. Wants `pip install dynnet[serve]`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from dynnet.deploy import Runner
from dynnet.deploy.manifest import read_manifest
from dynnet.errors import RequestError
from dynnet.serving.door import LARGEST, Door, full
from dynnet.serving.http import received, refusal, response

_AT_THE_FRONT = 10_000  # requests; it only waits for replicas, which refuse by themselves
_ATTEMPTS = 5  # to have an image answered, where replicas die on it


class Replica:
    """A process with the model, all of its stages: images of several requests in one batch."""

    def __init__(self, folder: str, threads: int, batch: int, wait_ms: float) -> None:
        self._runner = Runner(folder, threads)
        self._door = Door(self._runner.manifest, Path(folder))
        self._together.set_max_batch_size(batch)
        self._together.set_batch_wait_timeout_s(wait_ms / 1e3)

    @serve.batch
    async def _together(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        return self._door.answers(await asyncio.to_thread(self._runner.predict, np.stack(images)))

    async def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer; what is wrong with a request is no failure of the replica."""
        try:
            return 200, await self._together(await asyncio.to_thread(self._door.image, body))
        except RequestError as error:
            return error.status, {"detail": str(error)}


class Front:
    """Takes requests, and asks again where a replica died: an answer depends on nothing but its image."""

    def __init__(self, replicas: DeploymentHandle, folder: str, largest: int) -> None:
        self._replicas, self._door = replicas, Door(read_manifest(Path(folder)), Path(folder), largest)

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return response({"model": self._door.version})
        try:
            status, answer = await self._asked(await received(request, self._door))
        except RequestError as error:
            return refusal(error)
        return response(answer, status)

    async def _asked(self, body: bytes) -> tuple[int, dict[str, Any]]:
        for _ in range(_ATTEMPTS):
            try:
                return await self._replicas.answer.remote(body)
            except BackPressureError as error:
                raise full() from error
            except RayActorError:
                continue
        raise RequestError("replicas die while they answer this image; look at their logs", 500)


def application(
    folder: str | Path,
    *,
    replicas: int = 1,
    threads: int = 1,
    batch: int = 8,
    wait_ms: float = 2.0,
    queue: int = 100,
    largest: int = LARGEST,
) -> serve.Application:
    """For `ray.serve.run`.

    Args:
        folder: that `dynnet.export` wrote, on every machine.
        replicas: processes.
        threads: of the engine in each.
        batch: images of a call, at most; 1 for none to wait for others.
        wait_ms: milliseconds that the first image of a batch waits for others.
        queue: requests that wait for a replica; more are answered 503.
        largest: bytes of a body.

    Raises:
        ExportError: there is no exported model, or it is damaged.
    """
    Runner(folder, threads)  # what is wrong is told here, and not by replicas that start again and again
    place = str(Path(folder).resolve())
    model = serve.deployment(
        Replica,
        num_replicas=replicas,
        # They wait in the replica: where all are full, Ray's router tries again after pauses that grow to seconds.
        max_ongoing_requests=queue + batch,
        max_queued_requests=max(16, 2 * batch),
        health_check_period_s=1,
        ray_actor_options={"num_cpus": 0},  # how many fit on a machine is for who starts them to know
    ).bind(place, threads, batch, wait_ms)
    front = serve.deployment(Front, max_ongoing_requests=_AT_THE_FRONT, ray_actor_options={"num_cpus": 0})
    return front.bind(model, place, largest)
