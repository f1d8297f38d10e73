"""What is exported is held against the model: the graph that was cut, bit for bit; what an engine makes of a stage.

B batch, S stages, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynnet.deploy.engines import Engine
from dynnet.deploy.manifest import Port
from dynnet.deploy.stages import Stage
from dynnet.errors import ExportError
from dynnet.model import DynamicModel

_ROUNDING = 1e-3  # of the largest number, between PyTorch's kernels and an engine's


@torch.no_grad()
def checked_cut(
    model: DynamicModel, stages: Sequence[Stage], images: Tensor
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What each stage is fed and makes of some images, where that is what the model makes of them, bit for bit, and
    where a sample that stays behind others finds the same.

    Raises:
        ExportError: it is not.
    """
    fed, made = run_stages(stages, images)
    check_equal(model, stages, images, made)
    kept = torch.arange(1, len(images), 2, device=images.device)
    _, fewer = run_stages(stages, images, {0: kept})
    for stage, outputs, thinned in zip(stages[1:], made[1:], fewer[1:], strict=True):
        error = float((outputs[0][kept] - thinned[0]).abs().max())
        if not error <= _ROUNDING * float(outputs[0].abs().max()):
            raise ExportError(
                f"when samples have left, the others get another answer at exit {stage.exit}, by {error:.2g}: what "
                f"crosses a cut is not in the order of the samples; choose other exits"
            )
    return fed, made


def check_equal(model: DynamicModel, stages: Sequence[Stage], images: Tensor, made: Sequence[Sequence[Tensor]]) -> None:
    """
    Args:
        model: of which the stages were cut.
        made: by each stage, of the images.

    Raises:
        ExportError: stages answer otherwise than the model, be it by one bit.
    """
    logits, memory = model.forward_exits(images).logits, None
    for stage, outputs in zip(stages, made, strict=True):
        if not stage.answers:
            continue
        confidence, memory = model.measure(logits[stage.exit], memory)
        if not (torch.equal(outputs[0], logits[stage.exit]) and torch.equal(outputs[1], confidence)):
            raise ExportError(f"cut in stages, the model answers otherwise at exit {stage.exit}; choose other exits")


Run = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]  # of a stage, by its number, on what it takes


def run_stages(
    stages: Sequence[Stage], images: Tensor, kept: Mapping[int, Tensor] | None = None, run: Run | None = None
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Tensors fed to each stage, contiguous as an engine gets them, and made by it.

    Args:
        stages: in order.
        images: (B, C, H, W).
        kept: by the number of a stage, which of the samples that are here stay behind it; by default all.
        run: runs a stage; by default its graph.
    """
    run = run or (lambda number, tensors: stages[number].graph(*tensors))
    live, fed, made = {stages[0].takes[0].name: images}, [], []
    values: dict[str, Port] = {}
    for number, stage in enumerate(stages):
        # As the model lays them out: another layout means other kernels, which round otherwise.
        taken = [live[value.name] for value in stage.takes]
        fed.append([tensor.contiguous() for tensor in taken])
        made.append(list(run(number, taken)))
        live |= {value.name: tensor for value, tensor in zip(stage.gives, made[-1][2:], strict=True)}
        values |= {value.name: value for value in (*stage.takes, *stage.gives)}
        if kept is not None and number in kept:
            live = {name: _rows(tensor, kept[number], values[name]) for name, tensor in live.items()}
    return fed, made


def _rows(tensor: Tensor, kept: Tensor, value: Port) -> Tensor:
    each = torch.arange(value.per_sample, device=kept.device)
    return tensor.index_select(value.dim, (kept[:, None] * value.per_sample + each).flatten())


def checked_stage(
    engine: Engine, path: Path, stage: Stage, fed: Sequence[Tensor], made: Sequence[Tensor]
) -> dict[str, float]:
    """The largest differences between what the engine makes and what PyTorch made, for a batch and for one sample.

    Raises:
        ExportError: they are no rounding.
    """
    session = engine.open_stage(path, 1, stage)
    outputs = [Port("logits", 0, 1), Port("confidence", 0, 1), *stage.gives]
    found = dict.fromkeys((value.name for value in outputs), 0.0)
    for count in (len(made[0]), 1):
        given = [tensor.narrow(v.dim, 0, count * v.per_sample) for v, tensor in zip(stage.takes, fed, strict=True)]
        answers = session.run([np.ascontiguousarray(tensor.cpu().numpy()) for tensor in given])
        for value, tensor, answer in zip(outputs, made, answers, strict=True):
            own = tensor.narrow(value.dim, 0, count * value.per_sample).cpu().double()
            error = float((own - torch.from_numpy(answer).double()).abs().max())
            if not error <= _ROUNDING * max(1.0, float(own.abs().max())):
                raise ExportError(
                    f"the engine answers otherwise than PyTorch: {value.name} of {path.name} by {error:.2g}"
                )
            found[value.name] = max(found[value.name], error)
    return found
