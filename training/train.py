"""Train a backbone, then its exits, then all together.

    python -m training.train --recipe models/digits/recipe.yaml --out runs/digits
    python -m training.train --recipe models/cifar10-resnet20/recipe.yaml --data path/to/cifar10 --out runs/cifar
    python -m training.train --out runs/cifar --resume
    torchrun --nproc-per-node 2 -m training.train --recipe ... --out ...

The folder of a run holds recipe.yaml (resolved), log.jsonl, state.safetensors (for --resume), backbone.safetensors
(after the dense stage) and, at the end, model.safetensors with fitted thresholds. With --wrap.exits [] --heads.epochs 0
--joint.epochs 0 that is the backbone alone: a static baseline.

    B batch, K classes, E exits
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynnet import DynamicModel, calibrate, consolidate, wrap
from dynnet.backbone.host import preparation_of, prepare_
from dynnet.errors import CalibrationError, RecipeError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.files.bundles import write_atomically
from dynnet.files.checkpoints import load, save
from dynnet.files.creation import pruned_shape
from dynnet.gates.routers import Routers
from dynnet.learning.data import Data
from dynnet.learning.losses import budget_loss, exit_losses, exit_weights, expected_macs, gate_noise, joint_loss
from dynnet.learning.processes import World
from dynnet.learning.recipes import Recipe, StageConfig, read_recipe, recipe_to_yaml
from dynnet.outputs import ExitOutputs
from dynnet.thresholds.calibration import make_goal
from dynnet.thresholds.goals import Budget, Risk
from training.identity import identity_of
from training.log import Log
from training.loop import Desk, Objective, Stage, run_stage
from training.program import folder_of, make_backbone, open_data, run_program
from training.state import Position, State
from training.tools import make_tools
from training.widths import Sandwich, Widths, widths_loss

STAGES = ("dense", "heads", "joint")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program("training.train", __doc__, train, argv)


def train(recipe: Recipe, out: Path, resume: bool, here: World) -> DynamicModel:
    """Run a recipe to its end, from the beginning or from the last checkpoint in `out`."""
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    if recipe.consolidate.gated is not None and not resume:
        gated = read_recipe(folder_of(recipe.consolidate.gated) / "recipe.yaml").backbone
        recipe = dataclasses.replace(recipe, backbone=dataclasses.replace(gated, pretrained=False, weights=None))
    data, create = open_data(recipe, here)
    identity = identity_of("training.train", recipe, data)
    state = State.read(out / "state.safetensors") if resume else None
    if state is not None:
        state.check(identity, [getattr(recipe, stage) for stage in STAGES], len(data.train))
    with here.first_goes_first():
        model = _build(recipe, data, create, state)
    about = {**identity, "shape": dataclasses.asdict(pruned_shape(model.backbone, create))}
    model.to(here.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    _check(recipe, model, data, here)
    if here.first:
        write_atomically(out / "recipe.yaml", recipe_to_yaml(recipe).encode())
        print(f"{model.config.exits} on {recipe.backbone.name}, {data.label}: {len(data.train)} training images, "
              f"{len(data.calibration)} for calibration, {len(data.test)} for testing", flush=True)  # fmt: skip
    start = Position()
    if state is not None:
        start = state.position
        state.restore(model, None, None)
    with Log(out, state.about.log_bytes if state else 0, here) as log:
        desk = Desk(recipe, data, log, out, here, about)
        if state is None:
            State.write(out, start, model, None, None, log, here, about)  # from here on --resume works
        for stage in range(start.stage, len(STAGES)):
            if _runs(model, STAGES[stage], getattr(recipe, STAGES[stage])):
                resumed = stage == start.stage
                begin = start if resumed else Position(stage)
                run_stage(_stage(STAGES[stage], model, desk), desk, begin, state if resumed else None)
            if stage == 0 and here.first:
                save(model.backbone, out / "backbone.safetensors", create)
            State.write(out, Position(stage + 1), model, None, None, log, here, about)
        model.eval()
        if here.first:
            if model.exits:
                fitted = calibrate(model, data.loader("calibration", 256), **recipe.calibration.goal())
                log.write({"kind": "calibration", **dataclasses.asdict(fitted)})
                print(fitted, flush=True)
            save(model.backbone if _is_plain(model) else model, out / "model.safetensors", create)
        here.wait()
    return model


def _stage(name: str, model: DynamicModel, desk: Desk) -> Stage:
    """One of the stages of a run."""
    recipe, here = desk.recipe, desk.here
    gated = name == "joint" and model.gates is not None
    called: nn.Module = model.backbone if name == "dense" else model
    if gated and isinstance(model.gates, Routers):
        called = Sandwich(model)

    def forward(called: nn.Module, images: Tensor, progress: float) -> ExitOutputs | Widths:
        if name == "dense":
            return ExitOutputs((called(images),))
        if model.gates is not None:
            model.gates.noise = gate_noise(recipe.budget, progress)
        balanced = recipe.loss.equilibrium and name == "joint"
        return cast(ExitOutputs | Widths, called(images, equilibrium=balanced, gated=gated))

    def objective(outputs: ExitOutputs | Widths, target: Tensor, progress: float) -> Objective:
        return _objective(name, outputs, target, model, recipe, progress, here)

    def judge(judged: nn.Module) -> dict[str, Any]:
        return held_out(cast(DynamicModel, judged), desk.data, here, gated)

    def shown(found: dict[str, Any]) -> str:
        line = " / ".join(f"{a:.2%}" for a in found["accuracy"][-1 if name == "dense" else 0 :])
        return line + (f" at {found['macs']:.1%} of the MACs if nobody exits" if gated else "")

    return Stage(
        name,
        getattr(recipe, name),
        model,
        trained=_trained(name, model),
        called=called,
        forward=forward,
        objective=objective,
        judge=judge,
        shown=shown,
        still=(model.backbone,) if name == "heads" else (),
    )


def _objective(
    stage: str,
    said: ExitOutputs | Widths,
    target: Tensor,
    model: DynamicModel,
    recipe: Recipe,
    progress: float,
    here: World,
) -> Objective:
    outputs = said.routed if isinstance(said, Widths) else said
    logits, decisions = outputs.logits, outputs.decisions
    losses = exit_losses(logits, target, recipe.loss)
    if stage == "heads":
        return Objective(losses[:-1].sum(), losses)
    if stage == "dense":
        return Objective(losses[-1], losses)
    weights = exit_weights(recipe.loss, outputs.macs_shares, progress)
    loss = joint_loss(losses, weights)
    if isinstance(said, Widths):
        loss = widths_loss(said, loss, target, recipe.loss, weights)
    if decisions is None:
        return Objective(loss, losses)
    ledger = model.ledger()
    price = decisions.price(ledger, len(target))
    # The square of a mean: of the whole batch, not of each process's part.
    expected = here.mean(expected_macs(logits, price, ledger, recipe.budget, model.measure).mean())
    rates = here.mean(decisions.open_rates())
    loss = loss + budget_loss(expected, ledger.dense, rates, recipe.budget, progress)
    return Objective(loss, losses, {"expected_macs": expected.item() / ledger.dense, "open": rates.tolist()})


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
        outputs = model.forward_exits(images.to(here.device), gated=gated)
        logits, decisions = outputs.logits, outputs.decisions
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


def _trained(stage: str, model: DynamicModel) -> nn.Module:
    """The part that learns."""
    return {"dense": model.backbone, "heads": model.heads}.get(stage, model)


def _is_plain(model: DynamicModel) -> bool:
    """Is there nothing that decides by the input?"""
    return not model.exits and model.gates is None


def _runs(model: DynamicModel, stage: str, config: StageConfig) -> bool:
    """Is there anything to do? A model without exits has no heads to train."""
    return config.epochs > 0 and (bool(model.exits) or stage != "heads")


def _build(recipe: Recipe, data: Data, create: dict[str, Any], state: State | None) -> DynamicModel:
    """The wrapped backbone, with the weights that the recipe names or in the shape that a checkpoint has."""
    if recipe.consolidate.gated is not None and state is None:
        return _consolidated(recipe, data)
    backbone = make_backbone(recipe.backbone, create, state)
    prepare_(backbone, data.preparation)
    return wrap(backbone, recipe.wrap, input_size=data.input_size)


def _consolidated(recipe: Recipe, data: Data) -> DynamicModel:
    """The widths of the recipe, from the gates of a trained model."""
    gates, path = recipe.wrap.gates, folder_of(str(recipe.consolidate.gated))
    gated = load(path / "model.safetensors")
    if gates is None or not gates.widths:
        raise RecipeError("consolidate.gated wants wrap.gates.widths, such as [0.25, 0.5, 0.75, 1.0]")
    if not isinstance(gated, DynamicModel):
        raise RecipeError(f"consolidate.gated: {str(path)!r} holds a plain model; give one with gates on channels")
    said = {"classes": gated.class_names, **preparation_of(gated.backbone), "input_size": gated.input_size}
    here = {"classes": data.classes, **data.preparation}
    for key in ("classes", "input_size", "mean", "std"):
        if said.get(key) is not None and tuple(said[key]) != tuple(here[key]):
            raise RecipeError(
                f"consolidate.gated: {str(path)!r} was trained with {key} {list(said[key])}, and these data have "
                f"{list(here[key])}; they must be the same"
            )
    if isinstance(recipe.wrap.exits, int):
        raise RecipeError(f"consolidate.gated wants names in wrap.exits, where routers stand, not {recipe.wrap.exits}")
    seen = itertools.islice(data.sample_loader(128, seed=recipe.seed), recipe.consolidate.batches)
    images = [(batch.images, batch.labels) for batch in seen]
    print(f"consolidating {path.name}: {len(images)} batches", flush=True)
    return consolidate(gated, images, gates.widths, exits=recipe.wrap.exits, unit=gates.unit)


def _check(recipe: Recipe, model: DynamicModel, data: Data, here: World) -> None:
    """Refuse now what would fail only hours later."""
    if _is_plain(model) and (recipe.heads.epochs or recipe.joint.epochs):
        raise RecipeError(
            "wrap.exits names no exits and there are no gates; give at least one exit, or gates, or leave out the "
            "stages heads and joint to train the backbone alone"
        )
    if recipe.wrap.input_size not in (None, data.input_size):
        raise RecipeError(f"wrap.input_size={recipe.wrap.input_size}: the size of images is data.input_size; set that")
    for stage in STAGES:
        if _runs(model, stage, getattr(recipe, stage)):
            make_tools(_trained(stage, model), getattr(recipe, stage), stage, recipe, data, here)
    exit_weights(recipe.loss, [boundary.macs_share for boundary in model.boundaries], 1.0)
    if model.exits:
        goal = make_goal(**recipe.calibration.goal())
        goal.check(model)
        if isinstance(goal, Risk) and here.first and (told := goal.hopeless(len(data.calibration))):
            print(f"calibration: {told}", flush=True)
    if model.gates is not None and not _runs(model, "joint", recipe.joint):
        raise RecipeError(
            "joint.epochs=0: gates learn in the joint stage and decide at random without it; give 1 or more"
        )
    if model.gates is not None:
        try:
            Budget(recipe.budget.target).check(model)
        except CalibrationError as error:
            raise RecipeError(f"budget.target: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
