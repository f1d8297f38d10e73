"""A recipe: everything that decides what a training run gives. Read from YAML, saved beside the run."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from dynnet.backbone.chain import Combine
from dynnet.certificate import Harm
from dynnet.config import WrapConfig
from dynnet.errors import RecipeError
from dynnet.learning.data import DataConfig
from dynnet.learning.limits import check_limits
from dynnet.learning.losses import BudgetConfig, LossConfig
from dynnet.learning.optimisers import check_optimiser, check_schedule
from dynnet.learning.overrides import override_, pairs
from dynnet.learning.plain_yaml import read_yaml_file
from dynnet.learning.ranges import check_range
from dynnet.pruning.config import CutConfig
from dynnet.schema import flat, shown, typed

Plain = int | float | str | bool | None
STAGES = ("dense", "heads", "joint", "finetune")


@dataclass(frozen=True)
class BackboneConfig:
    """The backbone, by timm's name.

    Attributes:
        name: for `timm.create_model`.
        kwargs: further arguments of the model, such as {"width": 2.0}.
        pretrained: start from timm's weights.
        weights: start from this safetensors file instead; of a model with exits its backbone is taken.
    """

    name: str = "cifar_resnet20"
    kwargs: dict[str, Plain | list[Plain]] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
        epochs: 0 skips the stage.
        lr: peak learning rate.
        batch_size: over all processes together.
        opt: timm's name of the optimiser.
        momentum: of the optimiser, where it has one.
        weight_decay: on weights; biases and norms are spared unless `decay_norms`.
        decay_norms: weight decay on biases and norms too.
        sched: timm's name of the schedule, stepped after every update: "cosine", "tanh", "poly" (a straight line);
            "step", to a tenth after each third of the epochs, "multistep", after a half and three quarters; "none".
        warmup: share of the stage spent raising the learning rate.
        final_lr: the last learning rate, as a share of `lr`; not for steps, which end where they end.
        clip_grad: largest norm of the gradient; None for no limit.
    """

    epochs: int = 0
    lr: float = 0.1
    batch_size: int = 128
    opt: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norms: bool = True
    sched: str = "cosine"
    warmup: float = 0.1
    final_lr: float = 0.0
    clip_grad: float | None = None


@dataclass(frozen=True)
class CalibrationConfig:
    """What thresholds are fitted for: one goal, by default an accuracy drop of 0.005. See `dynnet.calibrate`."""

    budget: float | None = None
    latency: float | None = None
    accuracy_drop: float | None = None
    risk: float | None = None
    delta: float = 0.05
    of: Harm = "disagreement"
    engine: str = "onnxruntime"
    batch_size: int = 1

    def goal(self) -> dict[str, Any]:
        """The keywords for `dynnet.calibrate`.

        Raises:
            RecipeError: several goals are given.
        """
        goals = {key: getattr(self, key) for key in ("budget", "latency", "accuracy_drop", "risk")}
        given = {key: value for key, value in goals.items() if value is not None}
        if len(given) > 1:
            raise RecipeError(f"calibration has {given}; give one of budget, latency, accuracy_drop and risk")
        beside = {key: getattr(self, key) for key in ("delta", "of", "engine", "batch_size")}
        return {**(given or {"accuracy_drop": 0.005}), **beside}


@dataclass(frozen=True)
class CascadeConfig:
    """What `training.cascade` puts in a row, see `dynnet.cascade`.

    Attributes:
        members: models of the zoo, or folders of runs, the cheapest first.
        combine: "last" or "mean".
        input_sizes: of their images (C, H, W), where they are others than those that they were trained on.
        confidence: name of the measure; by default what wrapped members have.
    """

    members: tuple[str, ...] = ()
    combine: Combine = "last"
    input_sizes: tuple[tuple[int, int, int], ...] = ()
    confidence: str | None = None


@dataclass(frozen=True)
class ConsolidateConfig:
    """Gates on channels that are made into the widths of `wrap.gates.widths`, see `dynnet.consolidate`.

    Attributes:
        gated: a model of the zoo, or the folder of a run, that has them; None where widths are trained from the start.
        batches: of the training images, which tell how often channels are open.
    """

    gated: str | None = None
    batches: int = 40


@dataclass(frozen=True)
class PruningConfig(CutConfig):
    """What `training.prune` takes away, and how: `dynnet.pruning.config.CutConfig`, and

    Attributes:
        method: a criterion of `dynnet.prune` ("l1", "l2", "taylor", "fisher", "hessian", "activation", "slimming",
            "fpgm", "random") for whole channels; "layers" for whole residual blocks; "scratch" for the shape that "l1"
            leaves, trained from new weights; "magnitude", "lottery" or "n:m" for single weights.
        macs: by default 0.5, where channels or blocks go.
        sparsity: share of the weights that are zero at the end, where single weights go; by default 0.8.
        schedule: of the sparsity over the steps, with a part of the fine-tuning after each.
        n, m: of every m neighbouring weights n stay, for "n:m".
        scope: for single weights "group" means each layer by itself. Not for "layers".
        batches: that criteria look at, of the training images.
        recalibrate: batches for batch norms after every cut.
        distill: share of the loss that comes from the dense model's answers.
        temperature: of that distillation.
        slimming: how far the L1 penalty pulls the scales of batch norms to zero in the first half of the fine-tuning,
            in multiples of their mean, for "slimming": at 1 it closes channels that the loss does not defend.
        rewind: epochs of the dense stage after which "lottery" keeps the weights that it goes back to; 0 for the very
            first ones.
        early: file of such weights from another run of the same dense stage, in their place (its early.safetensors).
        int8: at the end also make, save and measure an int8 copy, for CPUs.
    """

    batches: int = 20
    method: str = "taylor"
    sparsity: float | None = None
    schedule: Literal["linear", "cubic"] = "cubic"
    n: int = 2
    m: int = 4
    recalibrate: int = 50
    distill: float = 0.0
    temperature: float = 4.0
    slimming: float = 0.4
    rewind: int = 0
    early: str | None = None
    int8: bool = False

    @property
    def cut(self) -> dict[str, Any]:
        """The fields that `dynnet.prune` takes, but for the target and the steps."""
        shared = {field.name for field in dataclasses.fields(CutConfig)} - {"macs", "latency", "steps"}
        return {name: getattr(self, name) for name in sorted(shared)}


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        description: the command, the hardware, the hours, the accuracy to expect.
        seed: of weights, batches and augmentation.
        data, backbone, loss: see their classes.
        wrap: where exits stand and how channels are gated, as for `dynnet.wrap`; the size of images is that of the
            data.
        budget: what gates are trained for, in the joint stage.
        dense: trains the backbone alone.
        heads: trains the heads on the frozen backbone.
        joint: trains everything together.
        calibration: for the thresholds that are saved with the model.
        cascade: what `training.cascade` puts in a row.
        consolidate: the model whose gates become widths; its backbone takes the place of that which `backbone` names.
        pruning: what `training.prune` does after the dense stage.
        finetune: trains what pruning has left, all cuts together.
        amp: bfloat16 autocast, where the processor has instructions for it; float32 elsewhere.
        channels_last: memory format of images and weights.
        ema: decay of an exponential moving average of the weights, which is then what is saved; None for none.
        mixup, cutmix: alpha of timm's Mixup; 0 for none.
        log_steps: steps between lines of the training log.
        checkpoint_steps: steps between checkpoints; one is also written after every epoch.
    """

    description: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    wrap: WrapConfig = field(default_factory=WrapConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    dense: StageConfig = field(default_factory=StageConfig)
    heads: StageConfig = field(default_factory=StageConfig)
    joint: StageConfig = field(default_factory=StageConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    consolidate: ConsolidateConfig = field(default_factory=ConsolidateConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    finetune: StageConfig = field(default_factory=StageConfig)
    amp: bool = False
    channels_last: bool = True
    ema: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    log_steps: int = 20
    checkpoint_steps: int = 200

    def __post_init__(self) -> None:
        """Refuse what would fail only hours later.

        Raises:
            RecipeError: a number out of its limits, a name that timm does not know, several goals.
        """
        check_limits(self)
        if not isinstance(self.wrap.exits, tuple | list):  # where they stand is checked when they are placed
            check_range(self.wrap.exits, "wrap.exits", 0, 1000, whole=True)
        self.calibration.goal()
        for name in STAGES:
            stage: StageConfig = getattr(self, name)
            check_optimiser(stage.opt, f"{name}.opt")
            check_schedule(stage.sched, f"{name}.sched")
        for key in self.backbone.kwargs:
            if not key.isidentifier():
                raise RecipeError(f"backbone.kwargs has the key {shown(key)}; give names of arguments")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file; keys left out have their defaults.

    Args:
        path: the file.
        overrides: dotted, as on a command line: ["--joint.epochs", "3", "--seed=1"]. A value is YAML.

    Raises:
        RecipeError: a missing or malformed file, an unknown key, a value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.exists():
        raise RecipeError(f"no recipe {str(path)!r}; the zoo's recipes are models/*/recipe.yaml")
    given = read_yaml_file(path)
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise RecipeError(f"the recipe {str(path)!r} is {shown(given)}; expected keys and values")
    for key, text in pairs(overrides):
        _refuse_renamed(key)
        override_(given, Recipe, key, text)
    for key, _ in flat(given):
        _refuse_renamed(key)
    try:
        return cast(Recipe, typed(Recipe, given, error=RecipeError))
    except RecipeError as error:
        raise RecipeError(f"recipe {str(path)!r}: {error}") from error


# Keys of earlier versions, and what they are called now.
_RENAMED = {"exits.at": "wrap.exits", "exits": "wrap", "gates": "wrap.gates"}


def _refuse_renamed(key: str) -> None:
    for old, new in _RENAMED.items():
        if key == old or key.startswith(old + "."):
            raise RecipeError(f"unknown key {key!r}; it is {new + key.removeprefix(old)!r} now")


def recipe_keys() -> str:
    """Every key of a recipe as a dotted option, with what it means and its default, for --help."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        raise RecipeError("the keys are listed by jsonargparse; install it with `pip install dynnet[train]`") from None
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(Recipe, as_group=False)
    # A section as a whole is no option of ours.
    return re.sub(r"(?m)^  --\S+ CONFIG .*\n", "", parser.format_help()).removeprefix("options:\n")


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `read_recipe` reads back."""
    return yaml.safe_dump(plain_recipe(recipe), sort_keys=False, width=120)


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe, defaults included, as mappings, lists and scalars."""
    return cast(dict[str, Any], _plain(dataclasses.asdict(recipe)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
