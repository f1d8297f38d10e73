"""Can an architecture be exported in stages, and does an engine answer as PyTorch does? For `eval.coverage`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from dynnet import fold, wrap
from dynnet.backbone.input_size import input_size_of
from dynnet.deploy import engines
from dynnet.deploy.checks import check_equal, run_stages
from dynnet.deploy.stages import Stage, staged
from dynnet.errors import DynnetError, ExportError

AT = (1 / 3, 2 / 3)  # of the MACs, where exits stand


def create(name: str, meta: bool) -> nn.Module:
    """An architecture with random weights; encoders without a classifier of their own get one."""
    with torch.device("meta" if meta else "cpu"):
        return timm.create_model(name, num_classes=1000)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of any row, relative to its largest logit, absolute below one."""
    return float(((a - b).abs().amax(1) / a.abs().amax(1).clamp(min=1)).max())


@torch.no_grad()
def exported(name: str, engine: str, largest: float, folder: str) -> dict[str, Any]:
    """Columns of the table: is it exported, is the cut graph the model's own bit for bit, how far off is the engine?

    Args:
        name: timm's.
        engine: as for `dynnet.export`.
        largest: up to how many million parameters it is tried.
        folder: for the stages.

    Returns:
        "mparams", "exported", "cut", "engine_error", and where something fails "export_reason".
    """
    millions = sum(p.numel() for p in create(name, meta=True).parameters()) / 1e6
    row: dict[str, Any] = {"mparams": f"{millions:.1f}"}
    if millions > largest:
        return {**row, "export_reason": f"not tried, above {largest:g} million parameters"}
    row |= {"exported": False, "cut": False}
    torch.manual_seed(0)
    try:
        backbone = create(name, meta=False).eval()
        model = wrap(backbone, exits=list(AT))
        model.thresholds = [0.5] * len(model.exits)  # on
        model = fold(model)
        stages = staged(model, model.input_size)
        row["exported"] = True
        images = torch.randn(len(stages), *input_size_of(backbone))  # one for each exit
        fed, made = run_stages(stages, images)
        check_equal(model, stages, images, made)
        row["cut"] = True
        row["engine_error"] = f"{_error(engine, stages, fed, made, Path(folder)):.1e}"
    except DynnetError as error:
        row["export_reason"] = " ".join(str(error).split())
    except Exception as error:  # of any kind: it is the model's own code, or the engine's
        row["export_reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def _error(
    engine: str,
    stages: Sequence[Stage],
    fed: Sequence[Sequence[Tensor]],
    made: Sequence[Sequence[Tensor]],
    folder: Path,
) -> float:
    """The largest difference of the engine's logits from PyTorch's at any exit, each stage fed by the engine's own one
    before it; where all images stay, and where one leaves at each exit.

    Raises:
        ExportError: a stage cannot be written, or read.
    """
    chosen, paths = engines.engine(engine), [folder / f"stage_{number}" for number in range(len(stages))]
    for path, stage, tensors in zip(paths, stages, fed, strict=True):
        chosen.lower(stage, tensors, path.with_suffix(chosen.SUFFIX))
    sessions = [
        chosen.open_stage(path.with_suffix(chosen.SUFFIX), torch.get_num_threads(), stage)
        for path, stage in zip(paths, stages, strict=True)
    ]

    def run(number: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = [np.ascontiguousarray(tensor.numpy()) for tensor in tensors]
        try:
            return [torch.from_numpy(np.asarray(answer)) for answer in sessions[number].run(given)]
        except Exception as error:  # of the engine's kinds
            raise ExportError(f"the engine fails at stage {number}: {' '.join(str(error).split())[:300]}") from error

    images, count = fed[0][0], len(stages)
    _, together = run_stages(stages, images, None, run)
    _, thinned = run_stages(stages, images, {n: torch.arange(1, count - n) for n in range(count - 1)}, run)
    errors = [difference(own[0], ours[0]) for own, ours in zip(made, together, strict=True)]
    errors += [
        difference(own[0][number:], ours[0]) for number, (own, ours) in enumerate(zip(made, thinned, strict=True))
    ]
    return float(np.max(errors))  # NaN, if any is
