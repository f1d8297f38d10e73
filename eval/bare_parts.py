"""What could be saved at most: the parts of a bare backbone behind its exits, each exported alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynnet import DynamicModel, fold, wrap
from dynnet.backbone.twin import copy_of
from dynnet.deploy import Runner, engines
from dynnet.deploy.checks import run_stages
from dynnet.deploy.stages import staged
from dynnet.deploy.time_shares import Peek
from dynnet.deploy.turns import take_turns


@torch.no_grad()
def rests(model: DynamicModel, dense: Runner, size: int, calls: int) -> list[tuple[float, float]]:
    """For each exit what the backbone behind it takes for a whole batch and for half of one (at batch size 1 half of
    what it takes for the image), as shares of the time of the dense backbone: as much as leaving there can save.

    Args:
        model: in eval mode.
        dense: its backbone, exported.
        size: of the batch.
        calls: timed.
    """
    images, found = torch.randn(max(2, size), *model.input_size), []
    engine = engines.engine(dense.manifest.engine)
    for name in model.exits:
        one = fold(wrap(copy_of(model).unwrap(), [name], heads=Peek, input_size=model.input_size))
        one.thresholds = [0.0]  # on
        stages = staged(one, model.input_size)
        (_, fed), _ = run_stages(stages, images)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"rest{engine.SUFFIX}"
            engine.lower(stages[1], fed, path)
            session = engine.open_stage(path, dense.threads, stages[1])
            runs: dict[str, Callable[[Tensor], Any] | Runner] = {"dense": dense}
            for count in {size, max(1, size // 2)}:
                runs[str(count)] = _answering(session, [t[: len(t) // len(images) * count] for t in fed])
            times = take_turns(runs, [images[:size]] * (calls + 3))
        whole, half = (float(np.median(times[str(n)] / times["dense"])) for n in (size, max(1, size // 2)))
        found.append((whole, half if size > 1 else whole / 2))
    return found


def _answering(session: engines.Session, fed: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """What a stage makes of what it is fed, whatever it is asked."""
    given = [tensor.contiguous().numpy() for tensor in fed]
    return lambda _: session.run(given)
