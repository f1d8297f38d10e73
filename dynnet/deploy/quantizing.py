"""Exported stages in int8: ranges measured on what each stage is fed, thresholds fitted on what the stages say then.

A byte is coarser than a float, so an exit is a little less or more sure than it was. What a threshold meant is the
share of samples that leaves: each exit gets the one at which the same share of those that reach it leaves.

    N images, S stages in a row, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dynnet.deploy.engines import Engine
from dynnet.deploy.manifest import Manifest, Port, Quantized
from dynnet.deploy.runner import Opened, through, wanted
from dynnet.deploy.ways import Way
from dynnet.errors import DataError, ExportError
from dynnet.exits.rows import leaves, route
from dynnet.exits.threshold import to_json
from dynnet.model import DynamicModel

Images = Iterable[Tensor | Sequence[Tensor]]

_RANGES = 256  # images on which ranges are measured, drawn from all of them
_FEW = 64  # a stage, or a width, that fewer of them reach is shown the others too
_AT_ONCE = 32  # images
_NONSENSE = 0.5  # of the answers are others than the float stages': no rounding


class Said(NamedTuple):
    """What the stages say of images, all of which ran through all of them.

    Attributes:
        predictions: (N, S) int64.
        confidences: (N, S) float64.
        widths: (N, S) int64, in which each ran; 0 where there is one.
    """

    predictions: np.ndarray
    confidences: np.ndarray
    widths: np.ndarray


class Calibrating:
    """Images that int8 is fitted on; they are read once to draw a sample, and once more for thresholds.

    Args:
        model: that is exported.
        loader: batches of (images (B, C, H, W), ...), or of images alone, prepared as the model expects them.

    Attributes:
        sample: (n, C, H, W), on which ranges are measured, drawn from all images: loaders may go class by class.
        votes: does the model's confidence count votes?

    Raises:
        ExportError: no loader, one that can be gone through only once, images of another size, NaN or infinity.
        DataError: there are no images.
    """

    def __init__(self, model: DynamicModel, loader: Images | None) -> None:
        if loader is None:
            raise ExportError("int8 measures the range of every tensor; give images like those to come, as loader=")
        if isinstance(loader, Iterator):
            raise ExportError("the loader is an iterator, and is gone through twice; give a DataLoader, or a list")
        self._loader, self._size, self.votes = loader, tuple(model.input_size), model.measure.every_vote
        chosen: list[np.ndarray] = []
        draw, seen = np.random.default_rng(0), 0
        for images in self.batches():
            for image in images:
                seen += 1
                if len(chosen) < _RANGES:
                    chosen.append(image.copy())
                elif (place := int(draw.integers(seen))) < _RANGES:
                    chosen[place] = image.copy()
        self.sample = np.stack(chosen)

    def batches(self) -> Iterator[np.ndarray]:
        """(B, C, H, W) float32."""
        number = -1
        for number, batch in enumerate(self._loader):
            if isinstance(batch, dict):
                raise DataError(f"batch {number} of the loader is a dictionary; give images, or (images, ...)")
            tensor = batch if isinstance(batch, Tensor) else batch[0]
            images = tensor.detach().cpu().numpy().astype(np.float32, copy=False)
            if images.shape[1:] != self._size or not len(images):
                raise ExportError(
                    f"images of the loader have shape {images.shape}; give batches (B, C, H, W) of {self._size}"
                )
            if not np.isfinite(images).all():
                raise ExportError(f"batch {number} of the loader holds NaN or infinity; check how images are prepared")
            yield images
        if number < 0:
            raise DataError("the loader gave no batches; give it at least one image")


def quantize_(
    engine: Engine,
    files: Sequence[Path],
    ways: Sequence[Way],
    thresholds: Sequence[float],
    calibrating: Calibrating,
) -> tuple[tuple[float, ...], Quantized]:
    """Turn the files of stages into int8.

    Args:
        engine: whose files they are.
        files: one for each way; they are written anew.
        ways: what is in them.
        thresholds: E, with which the float stages run.
        calibrating: ranges are measured on its sample, thresholds are fitted on all of its images.

    Returns:
        E thresholds for the int8 stages, and what was found.

    Raises:
        ExportError: the engine cannot quantize a stage, or the answers have little to do with those in float.
    """
    exact = _Chain(engine, files, ways)
    exits = [row[0].part.exit for row in exact.steps[:-1]]
    on = [thresholds[exit] for exit in exits]
    sample = calibrating.sample
    said = exact.say(sample)
    step = -1
    for file, way in zip(files, ways, strict=True):
        step += not way.width  # the narrowest is the first of a step
        rows = _reached(said, on, step, way.width)
        fed = _Fed(exact, step, way.stage.takes, sample[rows])
        engine.quantize(file, fed, way.stage, first=step == 0)
    coarse = _Chain(engine, files, ways)
    pairs = [(exact.say(images), coarse.say(images)) for images in calibrating.batches()]
    before, after = (Said(*map(np.concatenate, zip(*part, strict=True))) for part in zip(*pairs, strict=True))
    # Where votes are counted, there is nothing between one vote and the next: the thresholds stay.
    fitted = on if calibrating.votes else same_shares(before.confidences, after.confidences, on)
    agreement = float((_answers(before, on) == _answers(after, fitted)).mean())
    if agreement < _NONSENSE:
        raise ExportError(
            f"in int8 only {agreement:.0%} of {len(before.predictions)} images get the class that they get in float; "
            f"give a loader of images like those to come, prepared as the model expects them, or export it in float32"
        )
    found = list(thresholds)
    for exit, threshold in zip(exits, fitted, strict=True):
        found[exit] = threshold
    told = Quantized(len(sample), len(before.predictions), agreement, tuple(to_json(t) for t in thresholds))
    return tuple(found), told


def in_int8(manifest: Manifest, thresholds: Sequence[float], quantized: Quantized) -> Manifest:
    """What the folder says when its stages are in int8: a certificate, which holds for float32, is none any more."""
    manifest = manifest.voided("the certificate was given in float32, with other thresholds; it does not hold in int8")
    return dataclasses.replace(
        manifest,
        precision="int8",
        thresholds=tuple(to_json(t) for t in thresholds),
        quantized=quantized,
    )


def same_shares(before: np.ndarray, after: np.ndarray, thresholds: Sequence[float]) -> tuple[float, ...]:
    """Thresholds at which the same share of the samples that reach an exit leaves there.

    >>> exact, coarse = np.array([[0.9], [0.8], [0.6], [0.3]]), np.array([[0.7], [0.7], [0.5], [0.2]])
    >>> same_shares(exact, coarse, [0.75])
    (0.6,)

    Args:
        before: (N, E) or more columns, confidences that the thresholds were for; NaN never leaves.
        after: (N, E) or more, the confidences that are there now.
        thresholds: E; inf and -inf stay as they are, and so does one that no sample reaches.
    """
    here, there = np.ones(len(before), bool), np.ones(len(after), bool)
    found = []
    for exit, threshold in enumerate(thresholds):
        gone = here & leaves(before[:, exit], threshold)
        if math.isfinite(threshold) and here.any() and there.any():
            wanted = round(gone.sum() / here.sum() * there.sum())
            threshold = _threshold_for(after[there, exit], int(wanted), threshold)
        found.append(threshold)
        here &= ~gone
        there &= ~leaves(after[:, exit], threshold)
    return tuple(found)


def _threshold_for(confidences: np.ndarray, wanted: int, threshold: float) -> float:
    """One at which as many samples leave as wanted, or nearly where some are equally sure; between two samples.

    Args:
        confidences: (n,).
        wanted: 0 .. n.
        threshold: what it was, which stays where no sample says anything against it.
    """
    steps, counts = np.unique(confidences[~np.isnan(confidences)], return_counts=True)
    steps, leaving = steps[::-1], np.concatenate([[0], np.cumsum(counts[::-1])])
    level = int(np.abs(leaving - wanted).argmin())  # so many of the steps leave
    if level == 0:
        return max(threshold, math.nextafter(float(steps[0]), math.inf)) if len(steps) else threshold
    if level == len(steps):
        return min(threshold, float(steps[-1]))
    between = float(steps[level - 1] + steps[level]) / 2
    return between if between > steps[level] else float(steps[level - 1])


class _Chain:
    """Stages, one behind the other, for images that run through all of them, each in the width that its routers want.

    Attributes:
        steps: S, each with all of its widths.
    """

    def __init__(self, engine: Engine, files: Sequence[Path], ways: Sequence[Way]) -> None:
        opened = [
            Opened(way.stage, engine.open_stage(file, None, way.stage), 0)
            for file, way in zip(files, ways, strict=True)
        ]
        self.steps = [list(row) for _, row in itertools.groupby(opened, key=lambda one: one.part.exit)]

    def run(self, images: np.ndarray) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray | None, list[np.ndarray]]]:
        """Of each step the tensors that are there with some images, the widths that they want, and what it makes."""
        live = {self.steps[0][0].part.takes[0].name: np.ascontiguousarray(images)}
        route = None
        for row in self.steps:
            widths = None if len(row) == 1 or route is None else wanted(live[route])
            made, _ = through(row, widths, live)
            yield live, widths, made
            live = live | dict(zip((port.name for port in row[0].part.gives), made[2:], strict=True))
            route = row[0].part.route

    def say(self, images: np.ndarray) -> Said:
        found = []
        for part in _parts(images):
            columns = [
                (logits.argmax(1), said.astype(np.float64), np.zeros(len(part), np.int64) if widths is None else widths)
                for _, widths, (logits, said, *_) in self.run(part)
            ]
            found.append([np.stack(column, 1) for column in zip(*columns, strict=True)])
        return Said(*map(np.concatenate, zip(*found, strict=True)))


@dataclasses.dataclass
class _Fed:
    """What a stage is fed with some images, a part of them at a time, as often as one likes."""

    chain: _Chain
    step: int
    takes: Sequence[Port]
    images: np.ndarray

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for part in _parts(self.images):
            live, *_ = next(itertools.islice(self.chain.run(part), self.step, None))
            yield [live[port.name] for port in self.takes]


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), _AT_ONCE):
        yield images[start : start + _AT_ONCE]


def _reached(said: Said, thresholds: Sequence[float], step: int, width: int | None) -> np.ndarray:
    """The images with which the ranges of a stage are measured: those that reach it and want its width, if they are not
    too few; else all that reach the step, or all.

    Args:
        said: of N images.
        thresholds: S - 1.
        step: of the S.
        width: of those that it has; None where there is one.
    """
    here = np.flatnonzero(route(said.confidences, thresholds) >= step)
    here = here if len(here) >= _FEW else np.arange(len(said.widths))
    mine = here if width is None else here[said.widths[here, step] == width]
    return mine if len(mine) >= _FEW else here


def _answers(said: Said, thresholds: Sequence[float]) -> np.ndarray:
    """(N,) the class that each image gets."""
    return said.predictions[np.arange(len(said.predictions)), route(said.confidences, thresholds)]
