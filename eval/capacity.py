"""Plan a large service by a small simulation: replicas for a rate of requests, tail latencies, the cost of a day.

    python -m eval.capacity path/to/images dense=stages-dense exits=stages --rate 10000 --p99_ms 50
    python -m eval.capacity path/to/images exits=stages --load load.json        # held against a load test

What a stage takes for 1 .. B rows, what decoding takes, and where each of the images leaves is measured here and now,
with one thread. The simulation (seeded) draws Poisson arrivals, hands each to the shorter queue of two replicas that
are drawn, forms batches as servers do (B images, or `wait_ms` after the first was taken), and runs each stage on the
rows that are left. What lies between a user and a replica (HTTP, queues between processes) is taken from a load test: at
its lowest rate each request is alone, and what its answer took beyond its own stages is the overhead, drawn anew for each
request.

B images of a batch, N images, E exits
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import ArgumentParser

from dynnet.deploy import Runner
from dynnet.errors import InputError
from dynnet.learning.pictures import is_picture
from dynnet.serving.door import Door
from eval.load import named
from eval.programs import errors_told, write_json

_REPEATS = 15
_MOST = 4096  # replicas


class Costs(NamedTuple):
    """What one model takes.

    Attributes:
        stage_ms: (B + 1, E + 1) of each step, for so many rows; 0 for none.
        decode_ms: of one request.
        exits: (N,) where images leave.
    """

    stage_ms: np.ndarray
    decode_ms: float
    exits: np.ndarray

    def batch_ms(self, exits: np.ndarray) -> float:
        """Of a batch of images that leave at these exits."""
        steps = np.arange(self.stage_ms.shape[1])
        rows = (exits[:, None] >= steps).sum(0)
        return float(self.stage_ms[rows, steps].sum() + len(exits) * self.decode_ms)


class Simulated(NamedTuple):
    """What users of a simulated service meet.

    Attributes:
        latency_ms: of every request.
        busy: share of the time in which replicas work.
    """

    latency_ms: np.ndarray
    busy: float


def main(
    images: Path,
    models: Sequence[str],
    rate: float = 10_000.0,
    p99_ms: float = 50.0,
    batch: int = 8,
    wait_ms: float = 2.0,
    seconds: float = 10.0,
    sample: int = 1000,
    seed: int = 0,
    load: Path | None = None,
    json: Path | None = None,
) -> None:
    """Plan, or compare with a load test.

    Args:
        images: folder of image files.
        models: NAME=FOLDER of exported models.
        rate: requests a second of the service.
        p99_ms: that ninety-nine of a hundred answers must keep.
        batch, wait_ms: of replicas.
        seconds: that are simulated.
        sample: images, to see where they leave.
        seed: of all that is drawn.
        load: figures of `python -m eval.load` on this machine, for the overhead, and to be compared with.
        json: file for the figures.
    """
    with errors_told():
        paths = [path for path in sorted(images.rglob("*")) if is_picture(path.name)][:sample]
        if not paths:
            raise InputError(f"no images in {str(images)!r}; name a folder of some")
        bodies = [path.read_bytes() for path in paths]
        tested = None if load is None else read_load(load)
        found = []
        for name, folder in map(named, models):
            costs = measured(folder, bodies, batch)
            mine = [one for one in tested["loaded"] if one["model"] == name] if tested else []
            overhead = overhead_of(costs, mine, tested["options"]["wait_ms"]) if tested and mine else np.zeros(1)
            if tested:
                found += compared(name, costs, mine, tested, overhead, seed)
            else:
                found.append(planned(name, costs, rate, p99_ms, batch, wait_ms, overhead, seconds, seed))
        if json is not None:
            write_json(found, json)


def read_load(path: Path) -> dict[str, Any]:
    """What a load test found.

    Raises:
        InputError: it is none.
    """
    try:
        said = dict(json.loads(path.read_text()))
        assert {"options", "loaded"} <= said.keys()
        assert all({"model", "rate", "p99_ms", "latencies_ms"} <= one.keys() for one in said["loaded"])
    except (OSError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{str(path)!r} holds no figures of eval.load ({error}); write them with --json") from None
    return said


def measured(folder: Path, bodies: Sequence[bytes], batch: int) -> Costs:
    """What an exported model takes here, with one thread, and where images leave.

    What a batch takes whose rows all leave at one exit is measured for every exit; a step is the difference of two.
    """
    runner = Runner(folder, threads=1)
    door = Door(runner.manifest, folder)
    images = np.stack([door.image(body) for body in bodies])
    exits = np.concatenate([runner.predict(part).exit for part in np.array_split(images, -(-len(images) // 64))])
    running = [number for number, threshold in enumerate(runner.thresholds) if threshold < np.inf]
    last = len(runner.exits)
    stage_ms = np.zeros((batch + 1, last + 1))
    for rows in range(1, batch + 1):
        given, before = images[np.arange(rows) % len(images)], 0.0
        for number in [*running, last]:
            thresholds = [np.inf] * last
            if number < last:
                thresholds[number] = -np.inf
            took = _median_ms(partial(runner.at(thresholds).predict, given))
            stage_ms[rows, number] = max(0.0, took - before)
            before = max(before, took)
    decode = _median_ms(partial(door.image, bodies[0]))
    return Costs(stage_ms, decode, exits)


def _median_ms(call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * 1e3


def simulated(
    costs: Costs,
    rate: float,
    replicas: int,
    batch: int,
    wait_ms: float,
    overhead_ms: np.ndarray,
    seconds: float,
    seed: int,
) -> Simulated:
    """Requests through replicas.

    Args:
        costs: of the model.
        rate: requests a second, of all replicas together.
        replicas: processes.
        batch, wait_ms: as servers have them.
        overhead_ms: of which each request's is drawn.
        seconds: of arrivals.
        seed: of all that is drawn.
    """
    generator = np.random.default_rng(seed)
    count = max(1, round(rate * seconds))
    arrivals = np.cumsum(generator.exponential(1e3 / rate, count))
    exits = generator.choice(costs.exits, count)
    chosen = generator.integers(replicas, size=(count, 2))
    finish, busy = np.zeros(count), 0.0
    waiting: list[list[int]] = [[] for _ in range(replicas)]  # requests, in their order
    free = np.zeros(replicas)  # when each has done what it was doing
    events: list[tuple[float, int, int]] = []  # when a batch closes, at which replica, of which generation
    generation = [0] * replicas

    def close_at(replica: int) -> None:
        """The batch that the first request in the queue has begun, or will when the replica is free."""
        begins = max(free[replica], arrivals[waiting[replica][0]])
        generation[replica] += 1
        heapq.heappush(events, (begins + (wait_ms if batch > 1 else 0.0), replica, generation[replica]))

    def run(replica: int, now: float) -> None:
        nonlocal busy
        taken, waiting[replica] = waiting[replica][:batch], waiting[replica][batch:]
        took = costs.batch_ms(exits[taken])
        busy += took
        free[replica] = now + took
        finish[taken] = now + took
        generation[replica] += 1
        if waiting[replica]:
            if len(waiting[replica]) >= batch:
                generation[replica] += 1
                heapq.heappush(events, (free[replica], replica, generation[replica]))
            else:
                close_at(replica)

    arrived = 0
    while arrived < count or events:
        if events and (arrived == count or events[0][0] <= arrivals[arrived]):
            now, replica, which = heapq.heappop(events)
            if which == generation[replica]:
                run(replica, now)
            continue
        now = arrivals[arrived]
        one, other = chosen[arrived]
        replica = int(one if _burden(waiting, free, one, now) <= _burden(waiting, free, other, now) else other)
        waiting[replica].append(arrived)
        arrived += 1
        if len(waiting[replica]) == batch:  # it is full: it runs at once, or as soon as it can
            if free[replica] <= now:
                run(replica, now)
            else:
                generation[replica] += 1
                heapq.heappush(events, (free[replica], replica, generation[replica]))
        elif len(waiting[replica]) == 1:
            close_at(replica)
    latency = finish - arrivals + generator.choice(overhead_ms, count)
    return Simulated(latency, busy / (replicas * max(float(finish.max()), 1e-9)))


def _burden(waiting: Sequence[Sequence[int]], free: np.ndarray, replica: int, now: float) -> tuple[int, float]:
    return len(waiting[replica]), max(0.0, float(free[replica]) - now)


def overhead_of(costs: Costs, tested: Sequence[dict[str, Any]], wait_ms: float) -> np.ndarray:
    """Milliseconds beyond decoding, waiting and stages, of requests that were alone: those of the lowest rate."""
    lowest = min(tested, key=lambda one: float(one["rate"]))
    latencies = np.asarray(lowest["latencies_ms"])
    alone = np.array([costs.batch_ms(costs.exits[[i % len(costs.exits)]]) for i in range(len(latencies))])
    return np.maximum(0.0, latencies - alone - wait_ms)


def planned(
    name: str,
    costs: Costs,
    rate: float,
    p99_ms: float,
    batch: int,
    wait_ms: float,
    overhead: np.ndarray,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """The fewest replicas with which a service keeps its promise.

    Raises:
        InputError: none do.
    """

    def p99(replicas: int) -> float:
        found = simulated(costs, rate, replicas, batch, wait_ms, overhead, seconds, seed)
        return float(np.quantile(found.latency_ms, 0.99))

    low, high = 0, 1
    while p99(high) > p99_ms:
        low, high = high, 2 * high
        if high > _MOST:
            raise InputError(f"{name}: no {_MOST} replicas keep a p99 of {p99_ms:g} ms; give it more, or --batch 1")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p99(middle) <= p99_ms else (middle, high)
    found = simulated(costs, rate, high, batch, wait_ms, overhead, seconds, seed)
    p50, p90, last = np.quantile(found.latency_ms, (0.5, 0.9, 0.99)).tolist()
    print(
        f"{name}: {high} replicas of one thread for {rate:g} requests a second, {found.busy:.0%} busy; "
        f"p50 {p50:.1f}, p90 {p90:.1f}, p99 {last:.1f} ms; {24 * high} core-hours a day",
        flush=True,
    )
    told = {"model": name, "rate": rate, "replicas": high, "busy": found.busy, "core_hours_a_day": 24 * high}
    return {**told, "p50_ms": p50, "p90_ms": p90, "p99_ms": last}


def compared(
    name: str,
    costs: Costs,
    mine: Sequence[dict[str, Any]],
    tested: dict[str, Any],
    overhead: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """What is simulated for the rates of a load test, beside what was measured there."""
    options, rows = tested["options"], []
    for one in mine:
        found = simulated(
            costs, one["rate"], 1, options["batch"], options["wait_ms"], overhead, float(tested["seconds"]), seed
        )
        p50, p99 = np.quantile(found.latency_ms, (0.5, 0.99)).tolist()
        print(
            f"{name} at {one['rate']:g} a second: p50 {p50:.1f} ms (measured {one['p50_ms']:.1f}), p99 {p99:.1f} "
            f"({one['p99_ms']:.1f}), {p99 / one['p99_ms'] - 1:+.0%}; replica {found.busy:.0%} busy",
            flush=True,
        )
        rows.append({"model": name, "rate": one["rate"], "p50_ms": p50, "p99_ms": p99, "measured": one["p99_ms"]})
    return rows


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of image files")
    parser.add_argument("models", nargs="+", help="NAME=FOLDER of exported models")
    parser.add_function_arguments(main, skip={"images", "models", "json", "load"})
    parser.add_argument("--load", type=Path, help="figures of eval.load, to be compared with")
    parser.add_argument("--json", type=Path, help="file for the figures")
    main(**vars(parser.parse_args()))
