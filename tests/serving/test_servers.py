"""Servers of exported models, as processes of their own: they answer as the runner does, whatever is sent to them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from dynnet.deploy import Runner
from dynnet.learning.sources import digits
from dynnet.serving.door import Door

pytest.importorskip("ray")
pytest.importorskip("litserve")


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two hundred digits, as files."""
    place, (source, _) = tmp_path_factory.mktemp("digits") / "one.png", digits()
    found = []
    for row in range(200):
        Image.fromarray(source.images[row, 0].numpy()).save(place)
        found.append(place.read_bytes())
    return found


@contextmanager
def served(folder: Path, *more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dynnet.serving", str(folder), "--port", str(port), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line)
                if "answers; Ctrl-C" in line:
                    break
            assert lines, "nothing was printed"
            assert "answers; Ctrl-C" in lines[-1], "".join(lines)
            address = f"http://127.0.0.1:{port}/predict"
            for _ in range(300):
                if ask(address, b"", "text/plain")[0] == 415:
                    break
                time.sleep(0.1)  # it says so before it listens
            yield address, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ask(address: str, body: bytes, kind: str = "image/png") -> tuple[int, dict]:
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
    except OSError:  # it does not listen yet
        return 0, {}


def expected(folder: Path, bodies: list[bytes]) -> list[dict]:
    runner = Runner(folder, threads=1)
    door = Door(runner.manifest, folder)
    return [door.answers(runner.predict(door.image(body)[None]))[0] for body in bodies]


def alike(said: dict, wanted: dict) -> bool:
    """Confidence is that of a batch, which rounds otherwise than one image alone."""
    near = abs(said["confidence"] - wanted["confidence"]) < 1e-4
    return near and all(said[key] == wanted[key] for key in wanted if key != "confidence")


def children(process: subprocess.Popen[str], name: str) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if name in line]


def check_full(address: str, bodies: list[bytes]) -> None:
    """A full queue says so, and nothing hangs."""
    with ThreadPoolExecutor(60) as clients:
        said = list(clients.map(lambda body: ask(address, body), bodies))
        assert {status for status, _ in said} == {200, 503}
        refused = next(words for status, words in said if status == 503)
        assert refused["detail"] == "the queue is full; come again in a second"
        assert ask(address, bodies[0])[0] == 200


def test_ray_answers_as_the_runner_does_and_loses_nothing_with_a_replica(folder: Path, bodies: list[bytes]) -> None:
    wanted = expected(folder, bodies)
    more = ("--replicas", "2", "--queue", "1", "--batch", "1")
    with served(folder, *more) as (address, process), ThreadPoolExecutor(8) as clients:
        answers = clients.map(lambda body: ask(address, body), bodies * 2)
        first = [next(answers) for _ in range(20)]
        replicas = children(process, "ray::ServeReplica:default:Replica")
        assert len(replicas) == 2
        os.kill(replicas[0], signal.SIGKILL)
        said = first + list(answers)
        assert [status for status, _ in said] == [200] * 400
        assert all(alike(one, other) for (_, one), other in zip(said, wanted * 2, strict=True))
        for body, kind, status in ((b"hello", "image/png", 400), (b"{}", "application/json", 415)):
            assert ask(address, body, kind)[0] == status
        check_full(address, bodies)


def test_litserve_answers_as_the_runner_does(folder: Path, bodies: list[bytes]) -> None:
    wanted = expected(folder, bodies)
    more = ("--server", "litserve", "--queue", "10")
    with served(folder, *more) as (address, _), ThreadPoolExecutor(8) as clients:
        said = list(clients.map(lambda body: ask(address, body), bodies))
        assert [status for status, _ in said] == [200] * 200
        assert all(alike(one, other) for (_, one), other in zip(said, wanted, strict=True))
        status, words = ask(address, b"hello")
        assert (status, "it is none of BMP" in words["detail"]) == (400, True)
        assert ask(address, b"{}", "application/json")[0] == 415
        check_full(address, bodies)
