"""Exits placed by time: an engine's shares of the time in place of shares of the MACs, which mislead where early layers
look at many pixels with few channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dynnet.backbone.input_size import input_size_of
from dynnet.backbone.twin import copy_of
from dynnet.deploy.stage_times import measure_times
from dynnet.errors import ExitError
from dynnet.exits.boundaries import Boundary, Places
from dynnet.exits.placing import resolve
from dynnet.wrapping import wrap


def exits_by_time(
    backbone: nn.Module,
    exits: int | Sequence[float],
    *,
    engine: str = "onnxruntime",
    batch_size: int = 1,
    input_size: tuple[int, int, int] | None = None,
) -> tuple[str, ...]:
    """Names for `dynnet.wrap(backbone, exits=...)`, placed by the time of an engine.

    >>> import timm, dynnet
    >>> backbone = timm.create_model("cifar_resnet20").eval()
    >>> names = exits_by_time(backbone, 2)
    >>> len(dynnet.wrap(backbone, exits=names).exits)
    2

    Args:
        backbone: a plain timm model.
        exits: shares of the time of a forward, such as [0.3, 0.6], or a number of exits spread evenly over it.
        engine: as for `dynnet.export`; the model is exported for the time, cut wherever an exit may stand.
        batch_size: of the images that are timed, in as many threads as PyTorch has.
        input_size: (C, H, W) of the images; by default what the model was made for.

    Raises:
        ExitError: shares outside of (0, 1) or out of order, or more exits than there are places.
        ExportError: the model cannot be exported, or the engine is not installed.
    """
    if not isinstance(exits, int) and not all(isinstance(share, float) for share in exits):
        raise ExitError(f"exits={exits!r}: give shares of the time, such as [0.3, 0.6], or a number of exits")
    size = input_size or input_size_of(backbone)
    places = Places(backbone, size)
    resolve(places, exits)  # told before anything is measured
    shares = time_shares(backbone, engine=engine, batch_size=batch_size, input_size=size)
    by_time = places.among([replace(b, macs_share=shares[b.name]) for b in places.candidates])
    return tuple(boundary.name for boundary in resolve(by_time, exits))


def time_shares(
    backbone: nn.Module,
    *,
    engine: str = "onnxruntime",
    batch_size: int = 1,
    input_size: tuple[int, int, int] | None = None,
) -> dict[str, float]:
    """The share of the time of a forward that is spent when each boundary is done, in running order.

    Args and errors as for `exits_by_time`.
    """
    size = input_size or input_size_of(backbone)
    names = [boundary.name for boundary in Places(backbone, size).candidates]
    model = wrap(copy_of(backbone).eval(), names, heads=Peek, input_size=size)
    everywhere = (True,) * len(names)
    threads = torch.get_num_threads()
    times = measure_times(model, [everywhere], engine=engine, threads=threads, rows=[batch_size])[everywhere]
    leaving = np.maximum.accumulate(times.leaving[:, 0])
    return dict(zip(names, (leaving[:-1] / leaving[-1]).tolist(), strict=True))


class Peek(nn.Module):
    """Stands where a head would, and takes no time: its logits are the first numbers of the features.

    Args:
        boundary: where it stands.
        num_classes: K.
    """

    def __init__(self, boundary: Boundary, num_classes: int) -> None:
        super().__init__()
        self.leaf, self.num_classes = boundary.features[0].leaf, num_classes

    def forward(self, output: object) -> Tensor:
        features: Tensor = pytree.tree_leaves(output)[self.leaf]
        few = features.flatten(1)[:, : self.num_classes]
        return F.pad(few, (0, self.num_classes - few.shape[1]))
