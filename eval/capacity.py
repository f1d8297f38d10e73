"""Plan a large service by a small simulation: replicas for a rate of requests, tail latencies, the cost of a day.

    python -m eval.capacity path/to/images dense=stages-dense exits=stages --rate 10000 --p99_ms 50
    python -m eval.capacity path/to/images exits=stages --load load.json        # held against a load test
    python -m eval.capacity path/to/images exits=stages --load load.json --rate 10000   # and planned with what it shows

What a stage takes for 1 .. B rows, what decoding takes, and where each of the images leaves is measured here and now,
with one thread; `eval/queueing.py` simulates. What a server adds is taken from a load test. At a rate above what a
replica bears it answers as fast as it can: what each answer takes there beyond its stages is the handling, which keeps
the replica busy. At the lowest rate each request is alone: what its answer took beyond stages, handling and the wait is
the overhead, on the way to a replica and back, drawn anew for each request.

B images of a batch, N images, E exits
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from dynnet.deploy import Runner
from dynnet.errors import InputError
from dynnet.serving.door import Door
from dynnet.serving.images import pictures_in
from eval.load import named
from eval.programs import errors_told, write_json
from eval.queueing import Costs, Service, simulated

_REPEATS = 15
_MOST = 4096  # replicas


def main(
    images: Path,
    models: Sequence[str],
    rate: float | None = None,
    p99_ms: float = 50.0,
    batch: int = 8,
    wait_ms: float = 2.0,
    queue: int = 100,
    seconds: float = 10.0,
    sample: int = 1000,
    seed: int = 0,
    load: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compare with a load test, plan, or both.

    Args:
        images: folder of image files.
        models: NAME=FOLDER of exported models.
        rate: requests a second of a service to be planned.
        p99_ms: that ninety-nine of a hundred answers must keep.
        batch, wait_ms, queue: of replicas.
        seconds: that are simulated.
        sample: images, to see where they leave.
        seed: of all that is drawn.
        load: figures of `python -m eval.load` on this machine, for the overhead, and to be compared with.
        json: file for the figures.
    """
    with errors_told():
        if rate is None and load is None:
            raise InputError("nothing to do; give --rate of a service to be planned, --load of a load test, or both")
        bodies = [path.read_bytes() for path in pictures_in(images)[:sample]]
        tested = None if load is None else read_load(load)
        if tested:
            batch, wait_ms, queue = (tested["options"][key] for key in ("batch", "wait_ms", "queue"))
        takes = {name: measured(folder, bodies, batch) for name, folder in map(named, models)}
        loads = {name: [one for one in tested["loaded"] if one["model"] == name] if tested else [] for name in takes}
        handling = handling_of(takes, loads, batch)
        if tested:
            print(f"the server takes {handling:.2f} ms of a replica for every request", flush=True)
        found = []
        for name, costs in takes.items():
            costs = costs._replace(request_ms=costs.request_ms + handling)
            overhead = overhead_of(costs, loads[name], wait_ms) if loads[name] else np.zeros(1)
            service = Service(1, batch, wait_ms, queue)
            if tested:
                found += compared(name, costs, loads[name], service, float(tested["seconds"]), overhead, seed)
            if rate is not None:
                found.append(planned(name, costs, rate, p99_ms, service, overhead, seconds, seed))
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
        needed = {"model", "rate", "throughput", "refused", "p50_ms", "p99_ms", "latencies_ms"}
        assert all(needed <= one.keys() for one in said["loaded"])
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


def handling_of(takes: Mapping[str, Costs], loads: Mapping[str, Sequence[dict[str, Any]]], batch: int) -> float:
    """Milliseconds of a replica that a server takes for a request: of models that were loaded with more than they bear,
    what an answer took there beyond its share of a full batch. Their median; 0 where there are none."""
    found = []
    for name, costs in takes.items():
        if over := [one for one in loads[name] if one["throughput"] < 0.9 * one["rate"] and one["refused"]]:
            full = costs.exits[: len(costs.exits) // batch * batch].reshape(-1, batch)
            stages = np.mean([costs.batch_ms(exits) for exits in full]) / batch
            found.append(1e3 / max(one["throughput"] for one in over) - stages)
    return max(0.0, float(np.median(found))) if found else 0.0


def overhead_of(costs: Costs, tested: Sequence[dict[str, Any]], wait_ms: float) -> np.ndarray:
    """Milliseconds beyond the wait and what the replica does, of requests that were alone: those of the lowest rate."""
    lowest = min(tested, key=lambda one: float(one["rate"]))
    latencies = np.asarray(lowest["latencies_ms"])
    alone = np.array([costs.batch_ms(costs.exits[[i % len(costs.exits)]]) for i in range(len(latencies))])
    return np.maximum(0.0, latencies - alone - wait_ms)


def planned(
    name: str,
    costs: Costs,
    rate: float,
    p99_ms: float,
    service: Service,
    overhead: np.ndarray,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """The fewest replicas with which a service keeps its promise, and refuses nobody.

    Raises:
        InputError: none do.
    """

    def kept(replicas: int) -> bool:
        found = simulated(costs, rate, service._replace(replicas=replicas), overhead, seconds, seed)
        return not found.refused and float(np.quantile(found.latency_ms, 0.99)) <= p99_ms

    low, high = 0, 1
    while not kept(high):
        low, high = high, 2 * high
        if high > _MOST:
            raise InputError(f"{name}: no {_MOST} replicas keep a p99 of {p99_ms:g} ms; give it more, or --batch 1")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    found = simulated(costs, rate, service._replace(replicas=high), overhead, seconds, seed)
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
    tested: Sequence[dict[str, Any]],
    service: Service,
    seconds: float,
    overhead: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """What is simulated for the rates of a load test, beside what was measured there."""
    rows = []
    for one in tested:
        found = simulated(costs, one["rate"], service, overhead, seconds, seed)
        p50, p99 = np.quantile(found.latency_ms, (0.5, 0.99)).tolist()
        print(
            f"{name} at {one['rate']:g} a second: p50 {p50:.1f} ms (measured {one['p50_ms']:.1f}), p99 {p99:.1f} "
            f"({one['p99_ms']:.1f}), {p99 / one['p99_ms'] - 1:+.0%}; refused {found.refused} ({one['refused']}); "
            f"replica {found.busy:.0%} busy",
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
