"""The steps of pruning: what each does to a model, and what they need.

B batch, K classes
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynnet.backbone.dry_run import trace
from dynnet.backbone.masks import is_masked
from dynnet.deploy.exporting import export
from dynnet.errors import RecipeError
from dynnet.files.bundles import write_bundle
from dynnet.files.checkpoints import load, save
from dynnet.files.creation import pruned_shape
from dynnet.learning.data import Data
from dynnet.learning.losses import distillation
from dynnet.learning.processes import World
from dynnet.learning.recipes import PruningConfig, Recipe, StageConfig
from dynnet.pruning import sparsity
from dynnet.pruning.criteria.weights import weight_of
from dynnet.pruning.norms import norm_scales, shrink_scales_
from dynnet.pruning.single_weights import set_masks_
from training.compare import accuracy, compare
from training.cuts import METHODS, Cuts, read_early, target_of
from training.identity import identity_of
from training.loop import Desk, Objective, Stage
from training.state import Position, State
from training.tools import make_tools


@dataclass(frozen=True)
class Step:
    """One step of the pipeline: training, or a change of the model.

    Attributes:
        name: for the log.
        epochs: of training; 0 for a change.
        change: gives the model that comes out.
        slimming: how far batch norm scales are pulled to zero, in multiples of their mean in the dense model.
    """

    name: str
    epochs: int = 0
    change: Callable[[nn.Module], nn.Module] | None = None
    slimming: float = 0.0


class Pipeline:
    """The steps of a run, and what they need.

    Attributes:
        identity: what the run is.
        steps: in order.
        target: what is aimed at, and its share.
        cuts: what its cuts take away.

    Raises:
        RecipeError: as `target_of`.
    """

    def __init__(self, recipe: Recipe, data: Data, create: dict[str, Any], out: Path, here: World) -> None:
        self.recipe, self.data, self.create, self.out, self.here = recipe, data, create, out, here
        self.size = data.input_size
        self.identity = identity_of("training.prune", recipe, data)
        self.target = target_of(recipe.pruning)
        self.cuts = Cuts(recipe, data, create, out, here, self.target)
        self.steps = [Step("dense", recipe.dense.epochs), Step("keep", change=self.keep)]
        self.steps += self._cutting(recipe.pruning, recipe.finetune.epochs)

    def _cutting(self, config: PruningConfig, epochs: int) -> list[Step]:
        """What follows the dense stage: cuts, and these epochs of training between and after them."""
        if config.method == "slimming":
            first = epochs // 2
            sparse = Step("slimming", first, slimming=config.slimming)
            return [sparse, Step("cut", change=self.cut(1)), Step("finetune", epochs - first)]
        steps: list[Step] = []
        for number in range(1, config.steps + 1):
            part = epochs * number // config.steps - epochs * (number - 1) // config.steps
            steps += [Step("cut", change=self.cut(number)), Step("finetune", part)]
        return steps

    def check(self, model: nn.Module) -> None:
        """Refuse now what would fail only hours later."""
        self._check_method()
        if self.recipe.pruning.method == "lottery":
            self._check_ticket(model)
        for step in self.steps:
            if step.epochs:
                make_tools(model, self.config(step), step.name, self.recipe, self.data, self.here)
        if self.recipe.pruning.int8:
            with tempfile.TemporaryDirectory() as folder:
                export(copy.deepcopy(model).cpu(), Path(folder) / "stages", input_size=self.size)
        self.cuts.rehearse(model)

    def _check_method(self) -> None:
        """Settings that do not go with the method or its target."""
        config, epochs = self.recipe.pruning, self.recipe.finetune.epochs
        if METHODS[config.method].at_once and config.steps > 1:
            raise RecipeError(f"pruning.steps={config.steps}: {config.method!r} goes in one step")
        if self.target[0] == "latency" and self.here.size > 1:
            raise RecipeError(f"pruning.latency={config.latency}: it is measured in one process, not {self.here.size}")
        if config.method == "layers" and config.exclude:
            raise RecipeError(
                f"pruning.exclude={list(config.exclude)}: 'layers' takes whichever block is needed least; leave it out"
            )
        if config.method == "slimming" and epochs < 2:
            raise RecipeError(f"finetune.epochs={epochs}: 'slimming' trains before and after its cut; give 2 or more")

    def _check_ticket(self, model: nn.Module) -> None:
        """Will there be early weights for a lottery ticket to go back to?"""
        config, epochs = self.recipe.pruning, self.recipe.dense.epochs
        if config.early is not None:
            read_early(config.early, model)
        elif not epochs:
            raise RecipeError(
                "lottery tickets go back to early weights: give dense.epochs, and no trained weights, or pruning.early"
            )
        elif not 0 <= config.rewind < epochs:
            raise RecipeError(
                f"pruning.rewind={config.rewind}: a ticket goes back to weights of the dense stage, of "
                f"dense.epochs={epochs}"
            )

    def config(self, step: Step) -> StageConfig:
        base = self.recipe.dense if step.name == "dense" else self.recipe.finetune
        return dataclasses.replace(base, epochs=step.epochs)

    def placed(self, model: nn.Module) -> nn.Module:
        model.to(self.here.device)
        return model.to(memory_format=torch.channels_last) if self.recipe.channels_last else model

    # Changes.

    def keep(self, model: nn.Module) -> nn.Module:
        """Save the dense model, to be compared with and learnt from."""
        if self.here.first:
            save(model, self.out / "backbone.safetensors", self.create)
        self.here.wait()
        return model

    def cut(self, number: int) -> Callable[[nn.Module], nn.Module]:
        """The cut of one step."""
        return lambda model: self.cuts.cut(model, number, self._teacher)

    def tell(self, step: Step, model: nn.Module, desk: Desk) -> None:
        """What a change has done, before anything is trained again."""
        found: dict[str, Any] = {
            "accuracy": [self.held_out_accuracy(model)],
            "macs": self._macs(model) / self._dense_macs,
            "sparsity": sparsity(model)[""],
        }
        desk.log.write({"kind": "change", "stage": step.name, **found})
        if self.here.first:
            rest = f"{found['sparsity']:.1%} zeros" if self._single_weights else f"{found['macs']:.1%} of the MACs"
            print(f"{step.name}: held-out accuracy {found['accuracy'][0]:.2%} at {rest}", flush=True)

    @functools.cached_property
    def _dense_macs(self) -> int:
        return self._macs(self._teacher)

    @property
    def _single_weights(self) -> bool:
        return METHODS[self.recipe.pruning.method].single_weights

    def _macs(self, model: nn.Module) -> int:
        return trace(model, self.size, 1).macs

    # Training.

    def stage(self, step: Step, model: nn.Module, desk: Desk) -> Stage:
        """A step of training."""
        config = self.recipe.pruning
        early = config.method == "lottery" and step.name == "dense"

        updates = step.epochs * (len(self.data.train) // self.config(step).batch_size)

        def forward(called: nn.Module, images: Tensor, progress: float) -> tuple[Tensor, Tensor | None]:
            if step.slimming:
                # In step with the learning rate, so that the loss can push back to the end.
                shrink_scales_(model, step.slimming * self._mean_scale * (1 + math.cos(math.pi * progress)) / updates)
            taught = None
            if config.distill and step.name != "dense":
                with torch.no_grad():
                    taught = self._teacher(images)
            return called(images), taught

        def objective(given: tuple[Tensor, Tensor | None], target: Tensor, progress: float) -> Objective:
            logits, taught = given
            loss = F.cross_entropy(logits.float(), target, label_smoothing=self.recipe.loss.label_smoothing)
            whole = loss
            if taught is not None:
                whole = (1 - config.distill) * loss
                whole = whole + config.distill * distillation(logits, taught.float(), config.temperature)
            return Objective(whole, loss.detach()[None])

        def judge(judged: nn.Module) -> dict[str, Any]:
            return {"accuracy": [self.held_out_accuracy(judged)]}

        def begins(epoch: int) -> None:
            if early and epoch == config.rewind and self.here.first:
                write_bundle(self.out / "early.safetensors", model.state_dict(), {"kind": "early weights"})

        def shown(found: dict[str, Any]) -> str:
            return f"{found['accuracy'][0]:.2%}"

        return Stage(step.name, self.config(step), model, model, model, forward, objective, judge, shown, begins=begins)

    @functools.cached_property
    def _teacher(self) -> nn.Module:
        return self.placed(load(self.out / "backbone.safetensors")).requires_grad_(False)

    @functools.cached_property
    def _mean_scale(self) -> float:
        return float(torch.cat([scale.abs().flatten() for scale in norm_scales(self._teacher)]).mean())

    def held_out_accuracy(self, model: nn.Module) -> float:
        """On the calibration split; every process judges all of it."""
        return accuracy(model, self.data, "calibration")

    # Checkpoints.

    def about(self, model: nn.Module) -> dict[str, Any]:
        """What has become of the model, for its checkpoints."""
        masked = [name for name, module in model.named_modules() if is_masked(module)]
        shape = dataclasses.asdict(pruned_shape(model, self.create))
        return {**self.identity, "shape": shape, "masked": masked}

    def checkpoint(self, position: Position, model: nn.Module, desk: Desk) -> None:
        State.write(self.out, position, model, None, None, desk.log, self.here, self.about(model))

    def restore(self, model: nn.Module, state: State) -> None:
        """Make a model of the right shape that of a checkpoint."""
        with state.told():
            masked = {name: weight_of(model.get_submodule(name)) for name in state.about.masked}
            set_masks_(model, {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in masked.items()})
        state.restore(model, None, None)

    # The end.

    def results(self, model: nn.Module) -> dict[str, Any]:
        """Save what has come out, and compare it with what it began as."""
        config = self.recipe.pruning
        sparse = self._single_weights
        save(model, self.out / "model.safetensors", self.create, sparse=sparse)
        paths = {"dense": self.out / "backbone.safetensors", "pruned": self.out / "model.safetensors"}
        models = {"dense": self._teacher, "pruned": model}
        small = self.out / "int8" if config.int8 else None
        if small is not None:
            shutil.rmtree(small, ignore_errors=True)  # of an end that was cut short
            images = list(itertools.islice(self.cuts.sample(), config.batches))
            export(copy.deepcopy(model).cpu(), small, int8=True, loader=images, input_size=self.size)
        return {
            "model": self.recipe.backbone.name,
            "backbone_kwargs": self.recipe.backbone.kwargs,
            "dataset": self.data.label,
            "test_images": len(self.data.test),
            "pruning": dataclasses.asdict(config),
            "epochs": sum(step.epochs for step in self.steps if step.name != "dense"),
            **compare(models, paths, self.data, small),
        }
