"""The loop of all training: epochs of updates, judged after each, with checkpoints that resume exactly.

B batch, K classes
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.errors import NonFiniteError
from dynnet.evaluation.threads import fit_threads
from dynnet.learning.data import Batch, Data
from dynnet.learning.limits import EPOCHS
from dynnet.learning.processes import World
from dynnet.learning.randomness import seed_of
from dynnet.learning.recipes import Recipe, StageConfig
from training.distributed import SyncedBatchNorm
from training.log import Log
from training.precision import computes_bfloat16
from training.state import Position, State
from training.tools import Tools, make_tools


@dataclass(frozen=True)
class Objective:
    """What one update minimises.

    Attributes:
        loss: a scalar.
        losses: of each classifier, for the log.
        metrics: what else is worth logging.
    """

    loss: Tensor
    losses: Tensor
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: for the log.
        config: its settings.
        model: all of it: what is put into train mode, saved, averaged and judged.
        trained: the part whose parameters learn; the others are frozen.
        called: the part that `forward` calls, whose gradients processes share.
        forward: (called, images (B, C, H, W), progress in [0, 1)) to whatever `objective` needs; under autocast, if the
            recipe wants that.
        objective: (that, labels (B,) or probabilities (B, K), progress in (0, 1]) to what is minimised.
        judge: what held-out images say of the model: "accuracy", and what else is worth logging.
        shown: the same in a line for people.
        still: modules that stay in eval mode.
        begins: called with the number of an epoch before its first step.
    """

    name: str
    config: StageConfig
    model: nn.Module
    trained: nn.Module
    called: nn.Module
    forward: Callable[[nn.Module, Tensor, float], Any]
    objective: Callable[[Any, Tensor, float], Objective]
    judge: Callable[[nn.Module], dict[str, Any]]
    shown: Callable[[dict[str, Any]], str]
    still: tuple[nn.Module, ...] = ()
    begins: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Desk:
    """Where a run works: its recipe, its data, and where it writes.

    Attributes:
        about: what its checkpoints say besides the position.
    """

    recipe: Recipe
    data: Data
    log: Log
    out: Path
    here: World
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What the updates of a stage work with.

    Attributes:
        stage, desk: what is trained, and where.
        tools: its optimiser, schedule and loader.
        ema: the running average of the model, which is judged in its place; None without one.
        parallel: the part that is called, its gradients averaged over all processes.
        mixup: of images and labels; None without.
        exposed: layers whose gradients some CPUs get wrong in channels_last.
    """

    stage: Stage
    desk: Desk
    tools: Tools
    ema: ModelEmaV3 | None
    parallel: nn.Module
    mixup: Mixup | None
    exposed: Sequence[str]


def run_stage(stage: Stage, desk: Desk, begin: Position, state: State | None) -> None:
    """Train a stage, from its beginning or from a checkpoint within it.

    Args:
        stage: what is trained.
        desk: of the run.
        begin: the first step to do.
        state: the checkpoint to go on from; None at the beginning of a stage.
    """
    setup = _set_up(stage, desk, state)
    for epoch in range(begin.epoch, stage.config.epochs):
        began = time.monotonic()
        _train(setup, begin if epoch == begin.epoch else Position(begin.stage, epoch))
        _judge(setup, epoch, began)
        _checkpoint(setup, Position(begin.stage, epoch + 1))
    if setup.ema is not None:
        stage.model.load_state_dict(setup.ema.module.state_dict())
    stage.model.requires_grad_(True)


def _set_up(stage: Stage, desk: Desk, state: State | None) -> Setup:
    """Freeze what does not learn, go back to the checkpoint, and say how the stage runs."""
    recipe, here, model = desk.recipe, desk.here, stage.model
    tools = make_tools(stage.trained, stage.config, stage.name, recipe, desk.data, here)
    model.requires_grad_(False)
    stage.trained.requires_grad_(True)
    ema = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    if state is not None:
        state.restore(model, ema, tools.optimizer)
    parallel = here.parallel(stage.called)
    mixup = _mixup(recipe, len(desk.data.classes))
    exposed = at_risk(stage.trained) if here.device.type == "cpu" else []
    _tell_settings(stage, desk, exposed)
    return Setup(stage, desk, tools, ema, parallel, mixup, exposed)


def _train(setup: Setup, start: Position) -> None:
    """The updates of one epoch, from a step on, with checkpoints between them."""
    stage, recipe, loader = setup.stage, setup.desk.recipe, setup.tools.loader
    if stage.begins is not None and start.step == 0:
        stage.begins(start.epoch)
    stage.model.train()
    for module in stage.still:
        module.eval()
    bar = tqdm(
        loader.epoch(EPOCHS * start.stage + start.epoch, start.step),
        f"{stage.name} {start.epoch + 1}/{stage.config.epochs}",
        len(loader),
        initial=start.step,
        leave=False,
        disable=None if setup.desk.here.first else True,
    )
    for step, batch in enumerate(bar, start.step):
        position = dataclasses.replace(start, step=step)
        objective = _update(setup, batch, position)
        bar.set_postfix_str(f"loss {objective.loss.item():.3f}", refresh=False)
        if step % recipe.log_steps == 0:
            _log(setup, position, objective)
        if (step + 1) % recipe.checkpoint_steps == 0 and step + 1 < len(loader):
            _checkpoint(setup, dataclasses.replace(start, step=step + 1))


def _update(setup: Setup, batch: Batch, position: Position) -> Objective:
    """One update: forward, backward, a step of the optimiser."""
    stage, tools, recipe, here = setup.stage, setup.tools, setup.desk.recipe, setup.desk.here
    update = position.epoch * len(tools.loader) + position.step
    updates = stage.config.epochs * len(tools.loader)
    _seed(recipe.seed, position.stage, update, here.rank)
    if tools.scheduler is not None:
        tools.scheduler.step_update(update)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    images = batch.images.to(here.device, memory_format=layout)
    target = batch.labels.to(here.device)
    if setup.mixup is not None:
        images, target = setup.mixup(images, target)

    with _forward_context(recipe, here), right_gradients(setup.exposed):
        outputs = stage.forward(setup.parallel, images, update / updates)
    objective = stage.objective(outputs, target, (update + 1) / updates)
    _refuse_non_finite(objective, stage.name, position)

    tools.optimizer.zero_grad(set_to_none=True)
    objective.loss.backward()
    if stage.config.clip_grad is not None:
        nn.utils.clip_grad_norm_(stage.trained.parameters(), stage.config.clip_grad)
    tools.optimizer.step()
    if setup.ema is not None:
        setup.ema.update(stage.model, step=update)
    return objective


def _log(setup: Setup, position: Position, objective: Objective) -> None:
    """A record of one update; losses are means over all processes."""
    here = setup.desk.here
    record = {"kind": "step", "stage": setup.stage.name, "epoch": position.epoch, "step": position.step}
    losses = here.sum(objective.losses.detach().clone()) / here.size
    rate = setup.tools.optimizer.param_groups[0]["lr"]
    setup.desk.log.write({**record, "lr": rate, "losses": losses.tolist(), **objective.metrics})


def _judge(setup: Setup, epoch: int, began: float) -> None:
    """What held-out images say after an epoch, in the log and in a line for people."""
    stage, desk = setup.stage, setup.desk
    said = stage.judge(setup.ema.module if setup.ema is not None else stage.model)
    seconds = time.monotonic() - began
    desk.log.write({"kind": "epoch", "stage": stage.name, "epoch": epoch, **said, "seconds": round(seconds, 1)})
    if desk.here.first:
        head = f"{stage.name} {epoch + 1}/{stage.config.epochs}"
        print(f"{head}: held-out accuracy {stage.shown(said)}, {seconds:.1f} s", flush=True)


def _checkpoint(setup: Setup, position: Position) -> None:
    desk = setup.desk
    State.write(
        desk.out, position, setup.stage.model, setup.ema, setup.tools.optimizer, desk.log, desk.here, desk.about
    )


def _tell_settings(stage: Stage, desk: Desk, exposed: Sequence[str]) -> None:
    """Choose threads for a stage's steps, and say how it runs."""
    here = desk.here
    threads = fit_threads(stage.model, desk.data.input_size, stage.config.batch_size // here.size)
    if not here.first:
        return
    print(f"{stage.name}: {threads}", flush=True)
    if desk.recipe.amp and not computes_bfloat16(here.device):
        print(f"{stage.name}: in float32; this processor has no instructions for bfloat16", flush=True)
    if exposed and desk.recipe.channels_last:
        print(
            f"{stage.name}: not in channels_last, where some CPUs get their gradients wrong: {', '.join(exposed)}",
            flush=True,
        )


@contextmanager
def _forward_context(recipe: Recipe, here: World) -> Iterator[None]:
    with ExitStack() as stack:
        halved = recipe.amp and computes_bfloat16(here.device)
        stack.enter_context(torch.autocast(here.device.type, torch.bfloat16, enabled=halved))
        if here.size > 1:
            stack.enter_context(SyncedBatchNorm())
        yield


def _seed(*key: int) -> None:
    """Dropout, drop path and mixup depend on the position alone."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    np.random.seed(seed)


def _refuse_non_finite(objective: Objective, stage: str, position: Position) -> None:
    loss = objective.loss.item()
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss} in stage {stage!r}, epoch {position.epoch + 1}, step {position.step + 1} "
            f"(classifiers: {[round(x, 4) for x in objective.losses.tolist()]}); lower {stage}.lr, set "
            f"{stage}.clip_grad, or look at the images. The last checkpoint is untouched"
        )


def _mixup(recipe: Recipe, classes: int) -> Mixup | None:
    if recipe.mixup == recipe.cutmix == 0:
        return None
    # Labels are smoothed once, in the loss.
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)
