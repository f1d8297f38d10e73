"""Prune a backbone once for all inputs: (score, cut, measure batch norms anew, fine-tune) x n, then report.

    python -m training.prune --recipe models/digits/recipe.yaml --out runs/thin --method taylor --macs 0.5
    python -m training.prune --recipe ... --backbone.weights runs/cifar/backbone.safetensors --dense.epochs 0 --out ...
    python -m training.prune --out runs/thin --resume

Begins with the recipe's backbone, trained by its dense stage or from the weights that it names. The folder of a run
holds recipe.yaml (resolved), log.jsonl, state.safetensors (for --resume), backbone.safetensors (dense) and, at the end,
model.safetensors (`dynnet.load` reads it) and results.json, with --pruning.int8 true also int8, a folder for
`dynnet.deploy.Runner`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dynnet.backbone.host import prepare_
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.files.bundles import write_atomically
from dynnet.learning.processes import World
from dynnet.learning.recipes import Recipe, recipe_to_yaml
from dynnet.pruning import make_permanent_
from training.compare import table
from training.log import Log
from training.loop import Desk, run_stage
from training.pipeline import Pipeline
from training.program import make_backbone, open_data, run_program
from training.state import Position, State

SHORT = {"method": "pruning.method", "macs": "pruning.macs", "sparsity": "pruning.sparsity"}


def main(argv: Sequence[str] | None = None) -> int:
    return run_program("training.prune", __doc__, run, argv, SHORT)


def run(recipe: Recipe, out: Path, resume: bool, here: World) -> nn.Module:
    """Run the pipeline to its end, from the beginning or from the last checkpoint in `out`."""
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    data, create = open_data(recipe, here)
    pipeline = Pipeline(recipe, data, create, out, here)
    state = State.read(out / "state.safetensors") if resume else None
    if state is not None:
        state.check(pipeline.identity, [pipeline.config(step) for step in pipeline.steps], len(data.train))
    with here.first_goes_first():
        model = make_backbone(recipe.backbone, create, state)
    prepare_(model, data.preparation)
    model = pipeline.placed(model)
    if state is None:
        pipeline.check(model)
    if here.first:
        write_atomically(out / "recipe.yaml", recipe_to_yaml(recipe).encode())
    start = state.position if state else Position()
    if state is not None:
        pipeline.restore(model, state)
    with Log(out, state.about.log_bytes if state else 0, here) as log:
        desk = Desk(recipe, data, log, out, here)
        if state is None:
            pipeline.checkpoint(Position(), model, desk)
        for number in range(start.stage, len(pipeline.steps)):
            step = pipeline.steps[number]
            resumed = number == start.stage
            if step.change is not None:
                model = pipeline.placed(step.change(model))
                pipeline.tell(step, model, desk)
            elif step.epochs:
                begin = start if resumed else Position(number)
                about = dataclasses.replace(desk, about=pipeline.about(model))
                run_stage(pipeline.stage(step, model, desk), about, begin, state if resumed else None)
            pipeline.checkpoint(Position(number + 1), model, desk)
        if here.first:
            make_permanent_(model)
            results = pipeline.results(model.eval())
            write_atomically(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
            print(table(results))
        here.wait()
    return model


if __name__ == "__main__":
    sys.exit(main())
