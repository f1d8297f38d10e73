"""Processes that can be killed by the hundred: they are forked from one that has imported everything."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

from dynnet.learning.sources import digits
from training import prune, train

digits()  # what a run imports on its way is here before it is forked

PROGRAMS = {"train": train.main, "prune": prune.main}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.programs.mortal"])


def live(program: str, argv: Sequence[str]) -> None:
    """A run of a program, in a process of its own."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    raise SystemExit(PROGRAMS[program](argv))


def run_to_its_end(program: str, begin: Sequence[str], out: Path, chance: random.Random, longest: float) -> int:
    """Start a run, kill it at a moment that chance chooses, and go on until it ends by itself.

    Args:
        program: a key of `PROGRAMS`.
        begin: its command line, but for the folder.
        out: the folder.
        chance: of the moments.
        longest: seconds after which it is killed at the latest, and a little later after each kill: the machine may
            have become slower; inf to leave it alone.

    Returns:
        The number of kills.
    """
    kills = 0
    while True:
        resumed = (out / "state.safetensors").exists()
        argv = ["--out", str(out), *(["--resume"] if resumed else begin)]
        process = CONTEXT.Process(target=live, args=(program, argv))
        process.start()
        process.join(chance.uniform(0, longest) * 1.05**kills if longest < math.inf else None)
        process.kill()  # nothing, where it has ended
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, f"it ended with {process.exitcode} after {kills} kills"
        kills += 1
