"""Train a backbone, then its exits, then all together.

    python -m training.train --recipe models/digits/recipe.yaml --out runs/digits
    python -m training.train --recipe models/cifar10-resnet20/recipe.yaml --data path/to/cifar10 --out runs/cifar
    python -m training.train --out runs/cifar --resume
    torchrun --nproc-per-node 2 -m training.train --recipe ... --out ...

The folder of a run holds recipe.yaml (resolved), log.jsonl, state.safetensors (for --resume), backbone.safetensors
(after the dense stage) and, at the end, model.safetensors with fitted thresholds.

    B batch, K classes, E exits
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from dynnet import DynamicModel, calibrate, wrap
from dynnet.allocator import keep_freed_memory
from dynnet.calibrate import check_budget
from dynnet.checkpoint import load_weights, save, write_atomically
from dynnet.data import Data, Loader, load_data
from dynnet.errors import CalibrationError, CheckpointError, DynnetError, NonFiniteError, RecipeError, did_you_mean
from dynnet.gates import Decisions
from dynnet.losses import budget_loss, exit_losses, exit_weights, expected_macs, gate_noise
from dynnet.recipe import Recipe, StageConfig, read_recipe, recipe_parser, recipe_to_yaml
from training.distributed import SyncedBatchNorm, World, world
from training.state import Log, Position, State

STAGES = ("dense", "heads", "joint")


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = _command_line(argv)
    try:
        out = Path(options.out)
        saved = out / "recipe.yaml"
        if options.resume and not (out / "state.safetensors").is_file():
            raise CheckpointError(f"nothing to resume in {str(out)!r}: it holds no state.safetensors")
        if options.resume and (overrides or options.recipe):
            raise CheckpointError(
                f"--resume goes on with {str(saved)!r}; leave out --recipe and {overrides or 'overrides'}"
            )
        if not options.resume and (out / "state.safetensors").exists():
            raise CheckpointError(f"{str(out)!r} holds a run already; go on with --resume, or choose another --out")
        recipe = read_recipe(saved if options.resume else options.recipe, overrides)
        if options.data is not None:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=options.data))
        with world() as here:
            train(recipe, out, options.resume, here)
    except DynnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(recipe: Recipe, out: Path, resume: bool, here: World) -> DynamicModel:
    """Run a recipe to its end, from the beginning or from the last checkpoint in `out`."""
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    with here.first_goes_first():  # it may have to download
        data = load_data(recipe.data, _pretrained_cfg(recipe.backbone.name))
    create = {
        "model_name": recipe.backbone.name,
        "num_classes": len(data.classes),
        "in_chans": data.input_size[0],
        **recipe.backbone.kwargs,
    }
    with here.first_goes_first():
        model = _build(recipe, data, create, fresh=not resume)
    model.to(here.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    _check(recipe, model, data, here)
    if here.first:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "recipe.yaml", recipe_to_yaml(recipe).encode())
        print(f"{model.config.exits} on {recipe.backbone.name}, {data.label}: {len(data.train)} training images, "
              f"{len(data.calibration)} for calibration, {len(data.test)} for testing")  # fmt: skip
    start = Position()
    state: State | None = None
    if resume:
        state = State.read(out / "state.safetensors")
        start = state.position
        state.restore(model, None, None)
    with Log(out, state.log_bytes if state else 0, here) as log:
        if state is None:
            State.write(out, start, model, None, None, log, here)  # from here on --resume works
        for stage in range(start.stage, len(STAGES)):
            config: StageConfig = getattr(recipe, STAGES[stage])
            if _runs(model, STAGES[stage], config):
                begin = start if stage == start.stage else Position(stage)
                run_stage(model, data, recipe, begin, state if stage == start.stage else None, log, out, here)
            if stage == 0 and here.first:
                save(model.backbone, out / "backbone.safetensors", create)
            State.write(out, Position(stage + 1), model, None, None, log, here)
        model.eval()
        if here.first:
            if model.exits:
                fitted = calibrate(model, data.loader("calibration", 256), **recipe.calibration.goal())
                log.write({"kind": "calibration", **dataclasses.asdict(fitted)})
                print(fitted)
            save(model, out / "model.safetensors", create)
        here.wait()
    return model


def run_stage(
    model: DynamicModel,
    data: Data,
    recipe: Recipe,
    begin: Position,
    state: State | None,
    log: Log,
    out: Path,
    here: World,
) -> None:
    """Train one of the stages, from its beginning or from a checkpoint within it."""
    stage = STAGES[begin.stage]
    config: StageConfig = getattr(recipe, stage)
    tools = _tools(model, data, recipe, stage, here)
    trained, optimizer, scheduler, loader = tools.trained, tools.optimizer, tools.scheduler, tools.loader
    steps = len(loader)
    model.requires_grad_(False)
    trained.requires_grad_(True)
    ema = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    if state is not None:
        state.restore(model, ema, optimizer)
    parallel = here.parallel(model.backbone if stage == "dense" else model)
    mixup = _mixup(recipe, len(data.classes))
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format

    for epoch in range(begin.epoch, config.epochs):
        first_step = begin.step if epoch == begin.epoch else 0
        began = time.monotonic()
        model.train()
        if stage == "heads":
            model.backbone.eval()
        gated = stage == "joint" and model.gates is not None
        bar = tqdm(
            loader.epoch(10_000 * begin.stage + epoch, first_step),
            f"{stage} {epoch + 1}/{config.epochs}",
            steps,
            initial=first_step,
            leave=False,
            disable=None if here.first else True,
        )
        for step, batch in enumerate(bar, first_step):
            update = epoch * steps + step
            _seed(recipe.seed, begin.stage, update, here.rank)
            if scheduler is not None:
                scheduler.step_update(update)
            images = batch.images.to(here.device, memory_format=layout)
            target = batch.labels.to(here.device)
            if mixup is not None:
                images, target = mixup(images, target)

            with _forward_context(recipe, here):
                if stage == "dense":
                    logits, decisions = (parallel(images),), None
                else:
                    if model.gates is not None:
                        model.gates.noise = gate_noise(recipe.budget, update / (steps * config.epochs))
                    balanced = recipe.loss.equilibrium and stage == "joint"
                    logits, decisions = parallel(images, equilibrium=balanced, gated=gated)
            progress = (update + 1) / (steps * config.epochs)
            loss, losses, metrics = _loss(stage, logits, decisions, target, model, recipe, progress, here)
            _refuse_non_finite(loss, losses, stage, epoch, step)

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(trained.parameters(), config.clip_grad)
            optimizer.step()
            if ema is not None:
                ema.update(model, step=update)

            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            if step % recipe.log_steps == 0:
                record = {"kind": "step", "stage": stage, "epoch": epoch, "step": step}
                mean = here.sum(losses.detach().clone()) / here.size
                log.write({**record, "lr": optimizer.param_groups[0]["lr"], "losses": mean.tolist(), **metrics})
            if (step + 1) % recipe.checkpoint_steps == 0 and step + 1 < steps:
                State.write(out, Position(begin.stage, epoch, step + 1), model, ema, optimizer, log, here)
        judged = ema.module if ema is not None else model
        found = held_out(judged, data, here, gated)
        seconds = time.monotonic() - began
        log.write({"kind": "epoch", "stage": stage, "epoch": epoch, **found, "seconds": round(seconds, 1)})
        if here.first:
            shown = " / ".join(f"{a:.2%}" for a in found["accuracy"][-1 if stage == "dense" else 0 :])
            if gated:
                shown += f" at {found['macs']:.1%} of the MACs if nobody exits"
            print(f"{stage} {epoch + 1}/{config.epochs}: held-out accuracy {shown}, {seconds:.0f} s", flush=True)
        State.write(out, Position(begin.stage, epoch + 1, 0), model, ema, optimizer, log, here)
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    model.requires_grad_(True)


def _loss(
    stage: str,
    logits: tuple[Tensor, ...],
    decisions: Decisions | None,
    target: Tensor,
    model: DynamicModel,
    recipe: Recipe,
    progress: float,
    here: World,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What a stage minimises, the loss of each classifier, and what else is worth logging; progress in (0, 1]."""
    losses = exit_losses(logits, target, recipe.loss)
    if stage == "heads":
        return losses[:-1].sum(), losses, {}
    if stage == "dense":
        return losses[-1], losses, {}
    weights = exit_weights(recipe.loss, [boundary.share for boundary in model.boundaries], progress)
    loss = losses[-1] + (losses[:-1] * losses.new_tensor(weights)).sum()
    if decisions is None:
        return loss, losses, {}
    ledger = model.ledger()
    price = decisions.price(ledger, len(target))
    # The square of a mean: of the whole batch, not of each process's part.
    expected = here.mean(expected_macs(logits, price, ledger, recipe.budget, model.measure).mean())
    rates = here.mean(decisions.open_rates())
    loss = loss + budget_loss(expected, ledger.dense, rates, recipe.budget, progress)
    return loss, losses, {"expected_macs": expected.item() / ledger.dense, "open": rates.tolist()}


@torch.no_grad()
def held_out(model: DynamicModel, data: Data, here: World, gated: bool) -> dict[str, Any]:
    """What the calibration split says, when nobody exits; every image counts once.

    Returns:
        "accuracy": of each exit and the final head. With gates also "macs": mean, as a share of the backbone's, and
        lists by region: "open": the mean share of open units, "dead" and "always": shares of the units that are open
        for no image and for all.
    """
    model.eval()
    regions = model.gates.plan.regions if model.gates is not None and gated else ()
    units = [region.units for region in regions]
    classifiers = len(model.exits) + 1
    total = torch.zeros(classifiers + 2 + sum(units), dtype=torch.float64, device=here.device)
    for images, labels, _ in data.loader("calibration", 256, rank=here.rank, world=here.size):
        logits, decisions = model.forward_exits(images.to(here.device), gated=gated)
        hits = [(x.argmax(1) == labels.to(here.device)).sum() for x in logits]
        macs, opened = torch.zeros(()), []
        if decisions is not None:
            macs = decisions.price(model.ledger(tuple(images.shape[1:])), len(images)).sum()
            opened = [decisions.taken[n].decisions.sum(0) for n in range(len(regions))]
        seen = torch.tensor([len(labels), int(macs)], dtype=torch.float64, device=here.device)
        total += torch.cat([torch.stack(hits).double(), seen, *opened])
    here.sum(total)
    right, (count, saved), open_for = total.split([classifiers, 2, sum(units)])
    found: dict[str, Any] = {"accuracy": (right / count).tolist()}
    if regions:
        rates = (open_for / count).split(units)
        found["macs"] = float(1 + saved / count / model.ledger().dense)
        found["open"] = [float(rate.mean()) for rate in rates]
        found["dead"] = [float((rate == 0).double().mean()) for rate in rates]
        found["always"] = [float((rate == 1).double().mean()) for rate in rates]
    return found


@dataclass(frozen=True)
class Tools:
    """What one stage trains with."""

    trained: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: Loader


def _runs(model: DynamicModel, stage: str, config: StageConfig) -> bool:
    """Is there anything to do? A model without exits has no heads to train."""
    return config.epochs > 0 and (bool(model.exits) or stage != "heads")


def _tools(model: DynamicModel, data: Data, recipe: Recipe, stage: str, here: World) -> Tools:
    """Build a stage's loader, optimiser and schedule.

    Raises:
        DataError, RecipeError: the stage's settings do not work.
    """
    config: StageConfig = getattr(recipe, stage)
    trained: nn.Module = {"dense": model.backbone, "heads": model.heads, "joint": model}[stage]
    loader = data.train_loader(config.batch_size, seed=recipe.seed, rank=here.rank, world=here.size)
    if (recipe.mixup or recipe.cutmix) and config.batch_size // here.size % 2:
        raise RecipeError(f"mixup pairs images: {stage}.batch_size={config.batch_size} must be even in every process")
    try:
        optimizer = create_optimizer_v2(
            trained,
            config.opt,
            config.lr,
            config.weight_decay,
            config.momentum,
            filter_bias_and_bn=not config.decay_norms,
            param_group_fn=_gates_apart if config.decay_norms else None,
        )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup * config.epochs,
            warmup_lr=config.lr / 100,
            min_lr=config.lr * config.final_lr,
            step_on_epochs=False,
            updates_per_epoch=len(loader),
        )
    except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"timm cannot set up stage {stage!r} with {config}: {error}") from error
    return Tools(trained, optimizer, scheduler, loader)


def _gates_apart(trained: nn.Module) -> list[dict[str, Any]]:
    """Everything decays but the gates."""
    named = list(trained.named_parameters())
    gates = [p for name, p in named if name.startswith("gates.")]
    rest = [p for name, p in named if not name.startswith("gates.")]
    return [{"params": rest}, *([{"params": gates, "weight_decay": 0.0}] if gates else [])]


def _build(recipe: Recipe, data: Data, create: dict[str, Any], fresh: bool) -> DynamicModel:
    """The wrapped backbone; `fresh` models take the weights that the recipe names."""
    source = recipe.backbone
    try:
        backbone = timm.create_model(pretrained=source.pretrained and fresh, **create)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise RecipeError(f"timm cannot create {create} (pretrained={source.pretrained}): {error}") from error
    if source.weights and fresh:
        load_weights(backbone, _read_weights(source.weights), source.weights)
    return wrap(
        backbone,
        recipe.exits.at,
        gates=recipe.gates,
        head_share=recipe.exits.head_share,
        confidence=recipe.exits.confidence,
        input_size=data.input_size,
    )


def _check(recipe: Recipe, model: DynamicModel, data: Data, here: World) -> None:
    """Refuse now what would fail only hours later."""
    if not model.exits and model.gates is None:
        raise RecipeError("exits.at names no exits and there are no gates; give at least one exit, or gates")
    for key in ("log_steps", "checkpoint_steps"):
        if getattr(recipe, key) < 1:
            raise RecipeError(f"{key}={getattr(recipe, key)}: give at least 1")
    for stage in STAGES:
        if _runs(model, stage, getattr(recipe, stage)):
            _tools(model, data, recipe, stage, here)
    exit_weights(recipe.loss, [boundary.share for boundary in model.boundaries], 1.0)
    goal = recipe.calibration.goal()
    if "budget" in goal and model.exits:
        check_budget(model, goal["budget"])
    shares = {key: getattr(recipe.budget, key) for key in ("target", "ramp", "relax", "quiet")}
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise RecipeError(f"budget.{key}={share}: give a share in [0, 1]")
    for key in ("weight", "sharpness"):
        if not getattr(recipe.budget, key) > 0:
            raise RecipeError(f"budget.{key}={getattr(recipe.budget, key)}: give a number above 0")
    if model.gates is not None and _runs(model, "joint", recipe.joint):
        try:
            check_budget(model, recipe.budget.target)
        except CalibrationError as error:
            raise RecipeError(f"budget.target: {error}") from error


@contextmanager
def _forward_context(recipe: Recipe, here: World) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(here.device.type, torch.bfloat16, enabled=recipe.amp))
        if here.size > 1:
            stack.enter_context(SyncedBatchNorm())
        yield


def _seed(*key: int) -> None:
    """Dropout, drop path and mixup depend on the position alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)


def _refuse_non_finite(loss: Tensor, losses: Tensor, stage: str, epoch: int, step: int) -> None:
    if not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"the loss is {loss.item()} in stage {stage!r}, epoch {epoch + 1}, step {step + 1} (classifiers: "
            f"{[round(x, 4) for x in losses.tolist()]}); lower {stage}.lr, set {stage}.clip_grad, or look at the "
            f"images. The last checkpoint is untouched"
        )


def _mixup(recipe: Recipe, classes: int) -> Mixup | None:
    if recipe.mixup == recipe.cutmix == 0:
        return None
    # Labels are smoothed once, in the loss.
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)


def _pretrained_cfg(name: str) -> dict[str, Any]:
    if not timm.is_model(name):
        raise RecipeError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    return config.to_dict() if config is not None else {}


def _read_weights(path: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path!r}: {error}; give a safetensors file") from error


def _command_line(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        "training.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default=None, help="YAML file; the zoo's are models/*/recipe.yaml")
    parser.add_argument("--data", default=None, help="folder of the dataset, in place of the recipe's data.root")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    wanted = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(wanted):
        parser.epilog = "Every key of a recipe is an option as well:\n\n" + recipe_parser().format_help()
    options, overrides = parser.parse_known_args(argv)
    if not options.recipe and not options.resume:
        parser.error("give --recipe, or --resume with the --out of a run")
    return options, overrides


if __name__ == "__main__":
    sys.exit(main())
