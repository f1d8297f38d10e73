"""Put servers of exported models under load: throughput and latencies at given rates of requests.

    python -m eval.load path/to/images dense=stages-dense exits=stages --rates 20 100 200 --json load.json
    python -m eval.load path/to/images exits=stages --server litserve --check 1000

Each model gets a server of its own on this machine, one after the other. Requests come at random times (Poisson),
whether those before are answered or not, as from many users; what they wait for in a queue is in their latency.
`--check` first asks for so many images by eight clients, and compares with the runner. Client and server share the
processors.
Wants `pip install -e ".[serve,report]"`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
from jsonargparse import ArgumentParser

from dynnet.deploy import Runner
from dynnet.errors import InputError, VerificationError
from dynnet.serving.door import Door, check_free
from dynnet.serving.images import pictures_in
from eval.programs import errors_told, write_json

_READY = "answers; Ctrl-C"  # what a server prints
_WARM = 50  # requests before any counts
_LONGEST = 60.0  # seconds for one request


@dataclass(frozen=True)
class Loaded:
    """What a server did at one rate.

    Attributes:
        model: its name.
        rate: requests a second, on average.
        sent, answered, refused: requests; those that are neither failed otherwise.
        throughput: answers a second.
        p50_ms, p90_ms, p99_ms: of answered requests.
        latencies_ms: of answered requests, in their order.
    """

    model: str
    rate: float
    sent: int
    answered: int
    refused: int
    throughput: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    latencies_ms: tuple[float, ...]


def main(
    images: Path,
    models: Sequence[str],
    rates: Sequence[float],
    seconds: float = 20.0,
    server: Literal["ray", "litserve"] = "ray",
    batch: int = 8,
    wait_ms: float = 2.0,
    queue: int = 100,
    check: int = 0,
    port: int = 8765,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Load every model at every rate.

    Args:
        images: folder of image files.
        models: NAME=FOLDER of exported models.
        rates: requests a second.
        seconds: of each.
        server: behind which they stand.
        batch, wait_ms, queue: as for `python -m dynnet.serving`.
        check: images to be compared with the runner's answers first.
        port: of the servers.
        seed: of the times at which requests come.
        json: file for the figures.
    """
    with errors_told():
        bodies = [path.read_bytes() for path in pictures_in(images)]
        options = {"server": server, "batch": batch, "wait_ms": wait_ms, "queue": queue}
        found: list[Loaded] = []
        print("model          rate/s  sent  answered  503  answers/s   p50 ms   p90 ms   p99 ms")
        for name, folder in map(named, models):
            with serving(folder, port, options) as address:
                if check:
                    asyncio.run(_check(address, bodies[:check], folder))
                    print(f"{name}: {min(check, len(bodies))} answers are the runner's", flush=True)
                asyncio.run(_at_rate(address, bodies, 50.0, _WARM / 50.0, seed))
                for rate in rates:
                    found.append(_summed_up(name, rate, *asyncio.run(_at_rate(address, bodies, rate, seconds, seed))))
                    print(_row(found[-1]), flush=True)
        if json is not None:
            write_json({"options": options, "seconds": seconds, "loaded": [asdict(one) for one in found]}, json)


@contextlib.contextmanager
def serving(folder: Path, port: int, options: dict[str, Any]) -> Iterator[str]:
    """The address of a server that is started for the time.

    Raises:
        InputError: it does not start.
    """
    check_free("127.0.0.1", port)
    more = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "dynnet.serving", str(folder), "--port", str(port), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = ""
        try:
            for line in process.stdout:
                said += line
                if _READY in line:
                    break
            if _READY not in said:
                raise InputError(f"the server of {str(folder)!r} does not start: {said.strip()}")
            address = f"http://127.0.0.1:{port}/predict"
            asyncio.run(_until_there(address))
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


async def _until_there(address: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(address) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise InputError(f"nobody answers at {address}")


async def _check(address: str, bodies: Sequence[bytes], folder: Path) -> None:
    """
    Raises:
        VerificationError: an answer that is not the runner's.
    """
    runner = Runner(folder, threads=1)
    door = Door(runner.manifest, folder)
    places: asyncio.Queue[int] = asyncio.Queue()
    for number in range(len(bodies)):
        places.put_nowait(number)
    async with aiohttp.ClientSession() as session:

        async def client() -> None:
            while not places.empty():
                number = places.get_nowait()
                async with session.post(address, data=bodies[number], headers=_KIND) as answer:
                    said = await answer.json()
                (wanted,) = door.answers(runner.predict(door.image(bodies[number])[None]))
                near = abs(said.get("confidence", -1) - wanted["confidence"]) < 1e-4
                if not near or {**said, "confidence": 0} != {**wanted, "confidence": 0}:
                    raise VerificationError(f"image {number}: the server answers {said}, the runner {wanted}")

        await asyncio.gather(*(client() for _ in range(8)))


_KIND = {"Content-Type": "image/png"}


async def _at_rate(
    address: str, bodies: Sequence[bytes], rate: float, seconds: float, seed: int
) -> tuple[list[tuple[int, float]], float]:
    """Status and milliseconds of every request, and the seconds until the last was answered."""
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate, size=max(1, round(rate * seconds)))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(_LONGEST)) as session:

        async def ask(body: bytes) -> tuple[int, float]:
            began = time.perf_counter()
            try:
                async with session.post(address, data=body, headers=_KIND) as answer:
                    await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError):
                status = 0
            return status, (time.perf_counter() - began) * 1e3

        began, due, asked = time.perf_counter(), 0.0, []
        for number, gap in enumerate(gaps):
            due += gap
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            asked.append(asyncio.create_task(ask(bodies[number % len(bodies)])))
        return list(await asyncio.gather(*asked)), time.perf_counter() - began


def _summed_up(model: str, rate: float, requests: Sequence[tuple[int, float]], seconds: float) -> Loaded:
    answered = [took for status, took in requests if status == 200]
    p50, p90, p99 = np.quantile(answered, (0.5, 0.9, 0.99)).tolist() if answered else [float("nan")] * 3
    refused = sum(status == 503 for status, _ in requests)
    return Loaded(
        model, rate, len(requests), len(answered), refused, len(answered) / seconds, p50, p90, p99, tuple(answered)
    )


def _row(one: Loaded) -> str:
    return (
        f"{one.model:14} {one.rate:6g} {one.sent:5} {one.answered:9} {one.refused:4} {one.throughput:10.1f} "
        f"{one.p50_ms:8.1f} {one.p90_ms:8.1f} {one.p99_ms:8.1f}"
    )


def named(text: str) -> tuple[str, Path]:
    """
    Raises:
        InputError: not NAME=FOLDER.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise InputError(f"got {text!r}; give NAME=FOLDER of an exported model")
    return name, Path(folder)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of image files")
    parser.add_argument("models", nargs="+", help="NAME=FOLDER of exported models")
    parser.add_argument("--rates", type=float, nargs="+", default=[20.0, 50.0, 100.0], help="requests a second")
    parser.add_function_arguments(main, skip={"images", "models", "rates", "json"})
    parser.add_argument("--json", type=Path, help="file for the figures")
    main(**vars(parser.parse_args()))
