"""kill -9 at any moment: a run that is resumed ends as one that was left alone, to the last bit."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from dynnet.files.bundles import read_bundle
from tests.programs.mortal import run_to_its_end

TRAINED = """\
data: {name: digits, test: 0.7, crop: 1}
backbone: {name: cifar_resnet20, kwargs: {width: 0.125}}
wrap: {exits: [layer1.0], head_share: 0.2, gates: {unit: 1}}
dense: {epochs: 3, batch_size: 64}
heads: {epochs: 1, batch_size: 64}
joint: {epochs: 4, batch_size: 64}
ema: 0.9
mixup: 0.2
log_steps: 2
checkpoint_steps: 2
"""
PRUNED = """\
data: {name: digits, test: 0.7, crop: 1}
backbone: {name: cifar_resnet20, kwargs: {width: 0.25}}
dense: {epochs: 3, batch_size: 64}
finetune: {epochs: 4, batch_size: 64, opt: adamw, lr: 0.001}
pruning: {method: taylor, macs: 0.5, steps: 2, multiple: 1, batches: 2, recalibrate: 2}
checkpoint_steps: 2
"""


def kept(out: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What must not depend on kills: the log but for the seconds, and the SHA-256 of the models, as their files say."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    digests = {}
    for name in ("model", "backbone"):
        path = out / f"{name}.safetensors"
        read_bundle(path)  # is it whole?
        with safe_open(path, "pt") as file:
            digests[name] = file.metadata()["sha256"]
    return lines, digests


@pytest.mark.sweep
@pytest.mark.parametrize(("program", "text", "kills"), [("train", TRAINED, 200), ("prune", PRUNED, 50)])
def test_killed_runs_end_as_one_that_was_left_alone(program: str, text: str, kills: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    begin: Sequence[str] = ["--recipe", str(tmp_path / "recipe.yaml")]
    for _ in range(2):  # the second time nothing has to be imported any more
        shutil.rmtree(tmp_path / "alone", ignore_errors=True)
        began = time.monotonic()
        assert run_to_its_end(program, begin, tmp_path / "alone", random.Random(), longest=math.inf) == 0
        longest = 0.6 * (time.monotonic() - began)
    alone = kept(tmp_path / "alone")
    assert len(alone[0]) > 10
    seed = died = 0
    while died < kills:
        seed += 1
        out = tmp_path / f"killed {seed}"
        began = time.monotonic()
        deaths = run_to_its_end(program, begin, out, random.Random(seed), longest)
        if deaths == 0:  # the machine has become faster
            longest = min(longest, 0.6 * (time.monotonic() - began))
        died += deaths
        assert kept(out) == alone, seed
        assert list(out.glob(".*")) == [], seed
        shutil.rmtree(out)
    print(f"{died} kills in {seed} runs")
