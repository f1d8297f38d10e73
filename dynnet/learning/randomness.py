"""Random numbers that are a function of a key, such as (seed, epoch, step), and of nothing else."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A seed of 32 bits that depends on all of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])


def generator_of(*key: int) -> torch.Generator:
    """A generator whose stream depends on all of `key`."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators, seeded here and put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    seed = seed_of(*key)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
