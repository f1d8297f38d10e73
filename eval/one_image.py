"""What a model does with one image: every exit's answer, where it leaves, which channels run, and what that costs.

E exits, K classes
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dynnet
from dynnet import DynamicModel
from dynnet.backbone.chain import bare_of
from dynnet.backbone.host import preparation_of
from dynnet.deploy.turns import take_turns
from dynnet.evaluation.timing import in_engine
from dynnet.serving.images import prepared
from dynnet.thresholds.answers import ask


@dataclass(frozen=True)
class AtExit:
    """What one exit says.

    Attributes:
        name: of its module; "end" for the last.
        says: the class.
        confidence: NaN where it is unknown.
        threshold: that would have to be reached; None for the last.
        macs: of an image that answers here.
    """

    name: str
    says: str
    confidence: float
    threshold: float | None
    macs: int


@dataclass(frozen=True)
class Seen:
    """What became of an image.

    Attributes:
        exits: E + 1 of them, in running order; those behind the one that was taken did not run.
        taken: at which it left.
        shares: of each class, by name, by the exit that was taken.
        dense_macs: of the bare backbone.
        ms, dense_ms: medians of a few calls, in turns.
        open: of regions of gates, by their layer, the share of channels that ran.
    """

    exits: tuple[AtExit, ...]
    taken: int
    shares: dict[str, float]
    dense_macs: int
    ms: float
    dense_ms: float
    open: dict[str, float]


class Observer:
    """A model that is looked at, image by image.

    Args:
        model: with thresholds set.
        engine: in which it is timed against its bare backbone; None for PyTorch.

    Attributes:
        told: in what both are timed.
    """

    def __init__(self, model: DynamicModel, engine: str | None) -> None:
        self.model = model.eval()
        self._preparation = preparation_of(model)
        names = self._preparation.get("label_names")
        self.classes = tuple(names) if names else tuple(map(str, range(model.num_classes)))
        self.told = "PyTorch, folded" if engine is None else engine
        models: dict[str, nn.Module] = {"dynamic": self.model, "dense": bare_of(model)}
        self._runs: dict[str, Any] = {}
        if engine is None:
            self._runs = {name: dynnet.fold(each) for name, each in models.items()}
            return
        with in_engine(models, engine, model.input_size, exits="all") as runners:  # which have read their files
            self._runs = runners

    def look(self, path: Path, thresholds: list[float], calls: int = 15) -> Seen:
        """Show an image to the model.

        Args:
            path: of an image file.
            thresholds: one for each exit.
            calls: that are timed.

        Raises:
            DataError: it is no image.
        """
        model = self.model
        model.thresholds = thresholds
        image = torch.from_numpy(prepared(path, model.input_size, self._preparation)[None])
        answer = model.predict(image)
        said, taken = ask(model, image, None), int(answer.exit[0])
        ledger = model.ledger()
        running = [threshold != math.inf for threshold in model.thresholds]
        bills = ledger.bill(running) + (0 if said.gated is None else said.gated[0])
        exits = tuple(
            AtExit(
                (*model.exits, "end")[number],
                self.classes[int(said.predictions[0, number])],
                float(said.confidences[0, number]),
                None if number == len(model.exits) else model.thresholds[number],
                int(bills[number]),
            )
            for number in range(len(model.exits) + 1)
        )
        regions = model.gates.plan.regions if model.gates is not None else ()
        self._runs["dynamic"].thresholds = thresholds
        took = take_turns(self._runs, [image] * calls)
        return Seen(
            exits,
            taken,
            dict(zip(self.classes, answer.logits[0].softmax(0).tolist(), strict=True)),
            ledger.dense,
            float(np.median(took["dynamic"])),
            float(np.median(took["dense"])),
            {
                region.layer: float(mask[0].float().mean())
                for region, mask in zip(regions, said.masks, strict=True)
                if region.segment <= taken
            },
        )
