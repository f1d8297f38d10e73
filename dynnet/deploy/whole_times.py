"""What a model takes in an engine, timed as a whole on real images: with several widths, what a stage takes depends on
which samples want which."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from dynnet.backbone.chain import bare_of
from dynnet.deploy import engines
from dynnet.deploy.exporting import export
from dynnet.deploy.runner import Runner
from dynnet.deploy.stage_times import WARMUP, turns
from dynnet.deploy.turns import take_turns
from dynnet.model import DynamicModel


class WholeTimes:
    """A model in an engine, beside its bare backbone, in as many threads as PyTorch has.

    Args:
        model: in eval mode.
        images: (N, C, H, W), a batch of them at least; batches are drawn from them.
        engine: as for `dynnet.export`.
        batch_size: B.
        folder: that is there, and in which it is exported.

    Attributes:
        dense_ms: milliseconds of a batch through the bare backbone; NaN until something was timed.

    Raises:
        ExportError: it cannot be exported, or the engine is not installed.
    """

    def __init__(self, model: DynamicModel, images: Tensor, engine: str, batch_size: int, folder: Path) -> None:
        self.engine, self.threads, self.batch_size = engines.named(engine), torch.get_num_threads(), batch_size
        self._images, self._engine, self._folder = images.cpu(), engine, folder
        export(bare_of(model), folder / "dense", engine=engine, input_size=model.input_size)
        self._bare = Runner(folder / "dense", self.threads)
        self._known: dict[Hashable, Runner] = {}
        self.dense_ms = math.nan

    def share(self, model: DynamicModel, key: Hashable) -> float:
        """The mean time of a batch, as a share of the bare backbone's.

        Args:
            model: the same, in eval mode, at any thresholds.
            key: what else may be different about it.
        """
        key = key, model.running
        if key not in self._known:
            where = self._folder / str(len(self._known))
            export(model, where, engine=self._engine)
            self._known[key] = Runner(where, self.threads)
        runs = {"dense": self._bare, "ours": self._known[key].at(model.thresholds)}
        drawn = torch.Generator().manual_seed(0)
        count = turns(runs, self._images[: self.batch_size]) + WARMUP
        rows = [torch.randint(len(self._images), (self.batch_size,), generator=drawn) for _ in range(count)]
        times = take_turns(runs, (self._images[row] for row in rows), WARMUP)
        if math.isnan(self.dense_ms):
            self.dense_ms = float(times["dense"].mean())
        return float(times["ours"].mean() / times["dense"].mean())
