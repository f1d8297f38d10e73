"""Which heads make early exits right: designs of heads on one frozen backbone, and joint training beside them.

    python -m eval.heads runs/cifar10-resnet56 --data path/to/cifar10 --out runs/heads.json

All designs are trained together on what one frozen backbone gives, the run's dense one, with the same images in the
same order. Then comes the run's own model, whose backbone was trained together with its exits: as it is, and with its
heads trained once more, distilled from its last exit. Accuracies are of the calibration split; those within a budget
are of thresholds fitted on one half of it and read on the other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dynnet import DynamicModel
from dynnet.backbone.dry_run import trace
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.backbone.modes import device_of
from dynnet.errors import InputError
from dynnet.learning.data import Data
from dynnet.thresholds.answers import Answers, collect
from dynnet.thresholds.search import trade_off
from dynnet.thresholds.table import Table
from eval.designs import DESIGNS, Alone, Design, Host, chain
from eval.programs import errors_told, write_json
from eval.runs import open_run

BATCH = 128
HALVINGS = 5  # of the calibration split; each half is fitted on, and read
_RISE, _MOMENTUM, _DECAY = 0.2, 0.9, 5e-4  # share of the steps until a learning rate is at its peak; SGD's others
_TEMPERATURE = 2.0  # of the distillation, as in the recipes

Row = dict[str, Any]


def main(
    run: Path,
    data: str | None = None,
    epochs: int = 4,
    budgets: tuple[float, ...] = (0.4, 0.5, 0.6),
    out: Path | None = None,
) -> None:
    """Compare heads.

    Args:
        run: of `training.train`, with exits that read maps.
        data: folder of its dataset, where it is not the recipe's.
        epochs: of training, for every design.
        budgets: shares of the backbone's MACs.
        out: a JSON file for the figures.
    """
    with errors_told():
        opened = open_run(run, data)
        model, splits = opened.model, opened.data
        answers = collect(model, tqdm(splits.loader("calibration", 256), desc="the run", leave=False, disable=None))
        together = _row("trained together", model, Table(answers, model.ledger(), model.measure), budgets)
        rows = compare(Frozen(opened.dense, model), DESIGNS, splits, epochs, budgets)
        again = Design(
            "then its heads alone", lambda *_: [Alone(copy.deepcopy(head)) for head in model.heads], 0.02, 0.9
        )
        trained = copy.deepcopy(model).unwrap()
        rows = [*rows, together, *compare(Frozen(trained, model), [again], splits, epochs, budgets)]
        if out is not None:
            write_json({"run": run.name, "exits": model.exits, "epochs": epochs, "rows": rows}, out)
        print(_table(rows, model.exits, budgets))


class Frozen:
    """A backbone that learns nothing, and what it gives at its exits.

    Args:
        backbone: is copied.
        model: any that has its exits: the prices of its segments count, and how it measures confidence.
    """

    def __init__(self, backbone: nn.Module, model: DynamicModel) -> None:
        self.model = model
        self.backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
        self._seen: dict[str, Tensor] = {}
        for name in model.exits:
            self.backbone.get_submodule(name).register_forward_hook(partial(self._keep, name))
        self.shapes = [tuple(output.shape[1:]) for output in self(torch.zeros(2, *model.input_size))[0]]
        if any(len(shape) != 3 for shape in self.shapes):
            raise InputError(f"exits {model.exits} give {self.shapes}; designs of heads are compared on maps (C, H, W)")
        channels = [shape[0] for shape in self.shapes]
        self.host = Host(backbone, model.exits, channels, model.input_size, model.num_classes)

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise InputError(
                f"{name!r} gives a {type(output).__name__}; designs of heads are compared on maps (C, H, W)"
            )
        self._seen[name] = output

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What it gives at every exit, and its logits (B, K)."""
        logits = self.backbone(images.to(device_of(self.backbone)))
        return [self._seen[name] for name in self.model.exits], logits


@dataclass
class Pupil:
    """Heads of one design in training."""

    design: Design
    heads: nn.ModuleList
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def learn(self, outputs: Sequence[Tensor], teacher: Tensor, labels: Tensor) -> None:
        """One step."""
        loss, reached = teacher.new_zeros(()), teacher.new_ones(len(labels))
        wanted = (teacher / _TEMPERATURE).log_softmax(1)
        for logits in chain(self.heads.train(), outputs):
            told = F.cross_entropy(logits, labels, reduction="none")
            taught = F.kl_div((logits / _TEMPERATURE).log_softmax(1), wanted, reduction="none", log_target=True).sum(1)
            losses = (1 - self.design.distill) * told + self.design.distill * _TEMPERATURE**2 * taught
            loss = loss + (losses * reached).sum() / reached.sum()
            if self.design.weighted:
                reached = reached * (1 - logits.detach().softmax(1).amax(1)).clamp(min=0.01)
        self.optimizer.zero_grad()
        with right_gradients(at_risk(self.heads)):
            loss.backward()
        self.optimizer.step()
        self.schedule.step()


def compare(frozen: Frozen, designs: Sequence[Design], data: Data, epochs: int, budgets: Sequence[float]) -> list[Row]:
    """Train heads of all designs on what one backbone gives, and tell how right they are."""
    steps = epochs * len(data.train_loader(BATCH, seed=0))
    pupils = []
    for design in designs:
        torch.manual_seed(0)
        heads = nn.ModuleList(design.make(frozen.host)).to(device_of(frozen.backbone))
        optimizer = torch.optim.SGD(heads.parameters(), design.lr, _MOMENTUM, weight_decay=_DECAY, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, design.lr, steps + 1, pct_start=_RISE)
        pupils.append(Pupil(design, heads, optimizer, schedule))
    loader = data.train_loader(BATCH, seed=0)
    with tqdm(total=steps, desc="heads", leave=False, disable=None) as bar:
        for epoch in range(epochs):
            for images, labels, _ in loader.epoch(epoch):
                outputs, teacher = frozen(images)
                for pupil in pupils:
                    pupil.learn(outputs, teacher, labels.to(teacher.device))
                bar.update()
    return [_judged(frozen, pupil, data, budgets) for pupil in pupils]


@torch.no_grad()
def _judged(frozen: Frozen, pupil: Pupil, data: Data, budgets: Sequence[float]) -> Row:
    """How right the heads of a design are on the calibration split."""
    model, said, right = frozen.model, [], []
    for images, labels, _ in data.loader("calibration", 256):
        outputs, last = frozen(images)
        said.append(torch.stack([*chain(pupil.heads.eval(), outputs), last], 1).cpu())
        right.append(labels)
    logits = torch.cat(said)
    confidences, memory = [], None
    for exit in logits.unbind(1):
        confidence, memory = model.measure(exit, memory)
        confidences.append(confidence.double())
    answers = Answers(
        torch.cat(right).numpy(),
        logits.argmax(2).numpy(),
        torch.stack(confidences, 1).numpy(),
        model.exits,
        model.input_size,
    )
    prices = [trace(head, shape, 2).macs for head, shape in zip(pupil.heads, frozen.shapes, strict=True)]
    ledger = model.ledger()
    segments = [replace(segment, head=macs) for segment, macs in zip(ledger.segments, [*prices, 0], strict=True)]
    return _row(
        pupil.design.name, model, Table(answers, replace(ledger, segments=tuple(segments)), model.measure), budgets
    )


def _row(name: str, model: DynamicModel, table: Table, budgets: Sequence[float]) -> Row:
    """Of the table: shares of the MACs that heads cost, accuracy of every exit, and within budgets."""
    return {
        "heads": name,
        "macs": [macs / table.ledger.dense for macs in table.ledger.heads],
        "accuracy": table.answers.correct.mean(0).tolist(),
        "within": dict(zip((f"{budget:g}" for budget in budgets), _within(table, budgets), strict=True)),
    }


def _within(table: Table, budgets: Sequence[float]) -> list[float | None]:
    """Accuracy within each budget, on halves on which thresholds were not fitted; None where nothing is as cheap."""
    found: list[list[float]] = []
    for seed in range(HALVINGS):
        order = np.random.default_rng(seed).permutation(table.samples)
        half = table.samples // 2
        for fitted, read in ((order[:half], order[half:]), (order[half:], order[:half])):
            points, unseen = trade_off(table.subset(fitted)), table.subset(read)
            cheap = [[p for p in points if p.macs <= budget * table.ledger.dense] for budget in budgets]
            found.append([unseen.point(p[-1].thresholds).accuracy if p else np.nan for p in cheap])
    return [None if np.isnan(share) else float(share) for share in np.mean(found, 0)]


def _table(rows: Sequence[Row], exits: Sequence[str], budgets: Sequence[float]) -> str:
    """In Markdown."""
    titles = ["heads", "MACs of the heads", *exits, "last", *(f"at {budget:.0%}" for budget in budgets)]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for row in rows:
        cells = [row["heads"], ", ".join(f"{macs:.1%}" for macs in row["macs"])]
        cells += [f"{share:.1%}" for share in row["accuracy"]]
        cells += ["" if share is None else f"{share:.1%}" for share in row["within"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(main)
