"""A model that answers for days stays as small as it was."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dynnet
from dynnet.exits.sizes import REMEMBERED
from tests.cases import leave_one_by_one, tiny
from tests.exits.test_noted_sizes import OtherWays

IMAGES = 1_000_000
USUAL = [(side, side + more) for side in range(8, 28) for more in (0, 5)]  # sizes of images
NOISE = 16 * 2**20  # bytes


def resident() -> int:
    """Bytes of memory that this process has, when its allocator has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def batches(images: int) -> Iterator[tuple[int, int, int]]:
    """(B, H, W) of batches with so many images in all; every tenth is of a size that is seldom seen."""
    drawn, left = random.Random(0), images
    while left > 0:
        size = min(left, drawn.choice((1, 2, 5, 16, 64, 256)))
        left -= size
        seldom = drawn.random() < 0.1
        yield size, *((drawn.randint(8, 60), drawn.randint(8, 60)) if seldom else drawn.choice(USUAL))


@torch.no_grad()
def test_sizes_that_come_and_go_are_forgotten_and_answered_alike() -> None:
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=(3, 32, 32))
    leave_one_by_one(model, torch.randn(6, 3, 32, 32))
    sizes = [(16 + n % 20, 16 + n // 20) for n in range(REMEMBERED + 16)]

    def answers(sizes: list[tuple[int, int]]) -> list[dynnet.Prediction]:
        return [model.predict(torch.ones(2, 3, *size)) for size in sizes]

    first, again = answers(sizes), answers(sizes[::-1])[::-1]  # the first of them, which come last, are found anew
    assert len(model._sizes) == REMEMBERED
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # What is asked for again and again is not forgotten, whatever comes between.
    kept = model.ledger()
    for side in range(100, 101 + REMEMBERED):
        model._sizes.put((3, side, side), model._of_size((3, 16, 16)))
        assert model.ledger() is kept
    assert len(model._sizes) == REMEMBERED


@torch.no_grad()
def test_noted_sizes_are_right_after_their_lines_were_forgotten() -> None:
    model = dynnet.wrap(OtherWays().eval(), ["a"], input_size=(3, 64, 64))
    images = torch.randn(6, 3, 96, 96)
    taken = leave_one_by_one(model, images)
    for width in range(104, 104 + 8 * REMEMBERED, 8):
        model._sizes.put((3, 64, width), model._of_size((3, 64, 64)))
    assert model._sizes.get((3, 96, 96)) is None
    assert model.predict(images).exit.tolist() == taken.tolist()


@pytest.mark.sweep
@torch.inference_mode()
def test_memory_stays_level_over_a_million_images() -> None:
    model = dynnet.create_model("digits")
    generator = torch.Generator().manual_seed(0)
    leave_one_by_one(model, torch.randn(64, 1, 16, 16, generator=generator))
    done, taken, began = 0, torch.zeros(len(model.exits) + 1, dtype=torch.long), time.monotonic()
    levels: list[int] = []  # after every tenth of the images
    for size, height, width in batches(IMAGES):
        prediction = model.predict(torch.randn(size, 1, height, width, generator=generator))
        taken += prediction.exit.bincount(minlength=len(taken))
        done += size
        if done * 10 // IMAGES > len(levels):
            levels.append(resident())
    mebibytes = [level >> 20 for level in levels]
    print(f"{done} images in {time.monotonic() - began:.0f} s, exits {taken.tolist()}, MiB at every tenth {mebibytes}")
    assert done == taken.sum() == IMAGES
    assert (taken > 0).all()
    assert len(model._sizes) == REMEMBERED
    assert levels[-1] < levels[0] + NOISE
