"""A service of replicas, simulated: requests come at random, wait, form batches, and leave after the stages they need.

Poisson arrivals; each request goes to the shorter queue of two replicas that are drawn (Mitzenmacher, "The power of two
choices", https://doi.org/10.1109/71.963420), or is refused where too many wait; a replica takes B images, or what is
there `wait_ms` after it took the first, and runs each stage on the rows that are left.

B images of a batch, N images, E exits
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Costs(NamedTuple):
    """What one model takes.

    Attributes:
        stage_ms: (B + 1, E + 1) of each step, for so many rows; 0 for none.
        request_ms: of one request besides: decoding its image, and what the server does for it in the replica.
        exits: (N,) where images leave.
    """

    stage_ms: np.ndarray
    request_ms: float
    exits: np.ndarray

    def batch_ms(self, exits: np.ndarray) -> float:
        """Of a batch of images that leave at these exits."""
        steps = np.arange(self.stage_ms.shape[1])
        rows = (exits[:, None] >= steps).sum(0)
        return float(self.stage_ms[rows, steps].sum() + len(exits) * self.request_ms)


class Service(NamedTuple):
    """How replicas are run.

    Attributes:
        replicas: processes.
        batch, wait_ms, queue: as servers have them; more requests than `queue` and one batch a replica are refused.
    """

    replicas: int
    batch: int
    wait_ms: float
    queue: int


class Simulated(NamedTuple):
    """What users of a simulated service meet.

    Attributes:
        latency_ms: of every request that was answered.
        refused: requests.
        busy: share of the time in which replicas work.
    """

    latency_ms: np.ndarray
    refused: int
    busy: float


def simulated(
    costs: Costs, rate: float, service: Service, overhead_ms: np.ndarray, seconds: float, seed: int
) -> Simulated:
    """Requests through replicas.

    Args:
        costs: of the model.
        rate: requests a second, of all replicas together.
        service: how replicas are run.
        overhead_ms: of which each request's is drawn.
        seconds: of arrivals.
        seed: of all that is drawn.
    """
    replicas, batch, wait_ms, queue = service
    generator = np.random.default_rng(seed)
    count = max(1, round(rate * seconds))
    arrivals = np.cumsum(generator.exponential(1e3 / rate, count))
    exits = generator.choice(costs.exits, count)
    chosen = generator.integers(replicas, size=(count, 2))
    finish, busy = np.full(count, np.nan), 0.0
    under_way = 0
    waiting: list[list[int]] = [[] for _ in range(replicas)]  # requests, in their order
    free = np.zeros(replicas)  # when each has done what it was doing
    events: list[tuple[float, int, int]] = []  # when a batch closes, at which replica, of which generation
    generation = [0] * replicas
    done: list[tuple[float, int]] = []  # when how many are answered

    def schedule(replica: int, now: float) -> None:
        """When the next batch closes: full, as soon as the replica is free; else a wait after it was begun."""
        generation[replica] += 1
        first, full = arrivals[waiting[replica][0]], len(waiting[replica]) >= batch
        closes = max(free[replica], now) if full else max(free[replica], first) + wait_ms
        heapq.heappush(events, (closes, replica, generation[replica]))

    def run(replica: int, now: float) -> None:
        nonlocal busy, under_way
        taken, waiting[replica] = waiting[replica][:batch], waiting[replica][batch:]
        took = costs.batch_ms(exits[taken])
        busy += took
        free[replica] = now + took
        finish[taken] = now + took
        heapq.heappush(done, (now + took, len(taken)))
        if waiting[replica]:
            schedule(replica, now)

    arrived = 0
    while arrived < count or events:
        if events and (arrived == count or events[0][0] <= arrivals[arrived]):
            now, replica, which = heapq.heappop(events)
            if which == generation[replica]:
                run(replica, now)
            continue
        now = arrivals[arrived]
        while done and done[0][0] <= now:
            under_way -= heapq.heappop(done)[1]
        if under_way >= queue + replicas * batch:
            arrived += 1
            continue
        under_way += 1
        one, other = chosen[arrived]
        replica = int(one if _burden(waiting, free, one, now) <= _burden(waiting, free, other, now) else other)
        waiting[replica].append(arrived)
        arrived += 1
        if len(waiting[replica]) in (1, batch):  # it begins a batch, or fills it
            schedule(replica, now)
    latency = finish - arrivals + generator.choice(overhead_ms, count)
    answered = ~np.isnan(finish)
    return Simulated(latency[answered], int((~answered).sum()), busy / (replicas * float(np.nanmax(finish))))


def _burden(waiting: Sequence[Sequence[int]], free: np.ndarray, replica: int, now: float) -> tuple[int, float]:
    return len(waiting[replica]), max(0.0, float(free[replica]) - now)
