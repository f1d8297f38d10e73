"""An exported model, run: stage after stage on the samples that are still here. numpy and the engine, no torch.

B batch, b samples that are still here, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dynnet.deploy.engines import Session, engine
from dynnet.deploy.manifest import Manifest, Part, Port, later_use, read_manifest, steps
from dynnet.errors import InputError, ThresholdError
from dynnet.exits.rows import Rows, leaves
from dynnet.exits.threshold import check_thresholds, to_json


class Prediction(NamedTuple):
    """What a batch got, and what it cost: as `dynnet.Prediction`, in numpy.

    Attributes:
        logits: (B, K) of the exit at which each sample left.
        exit: (B,) int64, its number; E is the backbone's own head.
        confidence: (B,) of that exit.
        macs: (B,) int64, multiply-adds that ran for the sample; FLOPs are twice as many.
    """

    logits: np.ndarray
    exit: np.ndarray
    confidence: np.ndarray
    macs: np.ndarray


class Ported(Protocol):
    """What says what it takes and gives: a Part of a manifest, or a Stage that is not in one yet."""

    @property
    def takes(self) -> tuple[Port, ...]: ...
    @property
    def gives(self) -> tuple[Port, ...]: ...
    @property
    def exit(self) -> int: ...
    @property
    def answers(self) -> bool: ...
    @property
    def route(self) -> str | None: ...


class Opened(NamedTuple):
    """A stage of one width, ready to run, and what it adds to the bill of a sample."""

    part: Ported
    session: Session
    adds: int


class Runner:
    """An exported model, ready to answer. Safe in threads.

    Args:
        folder: that `dynnet.export` wrote.
        threads: of the engine; None for one a processor. 1 needs no pool, and is best for small models.
        confidence: from logits (b, K) to confidence (b,), where the model's own measure is Python code that no graph
            could hold; the manifest says so (`on_host`).

    Attributes:
        manifest: what the folder says.
        threads: as given.

    Raises:
        ExportError: no such folder, a file that is missing or has changed, another version, or an engine that is not
            installed.
        ThresholdError: confidence is missing, or is in the graphs already.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        confidence: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.manifest = read_manifest(Path(folder))
        self._confidence = _checked(confidence, self.manifest)
        self.threads = threads
        chosen = engine(self.manifest.engine)
        self._steps = [
            [Opened(part, chosen.open_stage(Path(folder) / part.file, threads, part), adds) for part, adds in row]
            for row in _priced(self.manifest.stages)
        ]
        self._later = later_use(self.manifest.stages)
        self._dtype = np.dtype(self.manifest.dtype)
        self._thresholds = tuple(float(t) for t in self.manifest.thresholds)

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the E exits."""
        return self.manifest.exits

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """K names, where the model knows them."""
        return self.manifest.class_names

    @property
    def void(self) -> str | None:
        """Why the certificate of the thresholds (`manifest.calibration["certificate"]`) does not hold, in words; None
        where it does, or where there is none. It was given for the model in PyTorch, from which the engine's answers
        differ by rounding."""
        said = self.manifest.calibration or {}
        if isinstance(void := said.get("void"), str):
            return void
        if said.get("certificate") is not None and said.get("thresholds") != tuple(map(to_json, self.thresholds)):
            return "it was given for other thresholds"
        return None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each exit: a sample leaves where its confidence >= the threshold; inf never, -inf always. An exit
        that was switched off when the model was exported has no stage, and stays off."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        checked = check_thresholds(values, self.exits)
        there = {stage.exit for stage in self.manifest.stages if stage.answers}
        for number, (name, value) in enumerate(zip(self.exits, checked, strict=True)):
            if number not in there and value != np.inf:
                raise InputError(
                    f"exit {name!r} was switched off when the model was exported, and has no stage; give it inf, or "
                    f"export with exits='all'"
                )
        self._thresholds = checked

    def at(self, thresholds: Sequence[float]) -> Runner:
        """A runner of the same stages, which are not opened again, with other thresholds."""
        other = copy.copy(self)
        other.thresholds = thresholds
        return other

    def predict(self, images: np.ndarray) -> Prediction:
        """Answer a batch.

        Args:
            images: (B, C, H, W), prepared as the manifest says, of its type.

        Raises:
            InputError: they are something else.
        """
        self._check(images)
        return self._run(images, self._thresholds)

    def audit(
        self, images: np.ndarray, prediction: Prediction, share: float, generator: np.random.Generator
    ) -> list[bool]:
        """Audit some answers, for a `dynnet.thresholds.watch.Watch`: those of early exits are compared with the full
        model's.

        Args:
            images: (B, C, H, W).
            prediction: what `predict` gave for them.
            share: of the answers, each drawn by itself; what the audit costs is this share of the full model, for those
                that left early.
            generator: of the draws.

        Returns:
            For each answer that was drawn: does the full model disagree?
        """
        self._check(images)
        drawn = generator.random(len(images)) < share
        early = drawn & (prediction.exit < len(self.exits))
        disagree = np.zeros(len(images), dtype=bool)
        if early.any():
            full = self._run(images[early], (np.inf,) * len(self.exits)).logits.argmax(1)
            disagree[early] = full != prediction.logits[early].argmax(1)
        return list(map(bool, disagree[drawn]))

    def _run(self, images: np.ndarray, thresholds: tuple[float, ...]) -> Prediction:
        rows = Rows(len(images))
        live = {self.manifest.stages[0].takes[0].name: np.ascontiguousarray(images)}
        spent = np.zeros(len(images), dtype=np.int64)
        answers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        route: str | None = None
        for ways, later in zip(self._steps, self._later, strict=True):
            widths = None if len(ways) == 1 or route is None else wanted(live[route])
            (logits, confidence, *given), adds = through(ways, widths, live)
            spent = spent + adds
            part = ways[0].part
            exit, route = part.exit, part.route
            if self._confidence is not None and part.answers:
                confidence = _asked(self._confidence, logits)
            if exit == len(thresholds):
                break
            live = {name: tensor for name, tensor in live.items() if name in later}
            gives = zip((port.name for port in part.gives), given, strict=True)
            live.update((name, tensor) for name, tensor in gives if name in later)
            leaving = leaves(confidence, thresholds[exit])
            count = int(np.count_nonzero(leaving))
            if count == len(leaving):
                break
            if count:
                gone, kept = rows.leave(exit, leaving)
                answers.append((logits[gone], confidence[gone], spent[gone]))
                spent = spent[kept]
                live = {name: _rows(tensor, kept, later[name]) for name, tensor in live.items()}
        answers.append((logits, confidence, spent))
        rows.finish(exit)
        taken = [np.full(len(said[0]), exit) for (exit, _), said in zip(rows.exits(), answers, strict=True)]
        logits, confidence, macs = (rows.in_order(list(parts)) for parts in zip(*answers, strict=True))
        return Prediction(logits, rows.in_order(taken), confidence, macs)

    def _check(self, images: np.ndarray) -> None:
        size = self.manifest.input_size
        if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[1:] != size or not len(images):
            got = f"shape {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise InputError(f"images: got {got}; give a numpy array (B, C, H, W) of {size}, of one image at least")
        if images.dtype != self._dtype:
            raise InputError(f"images are of {images.dtype}; give {self._dtype}, prepared as the manifest says")


def _checked(
    confidence: Callable[[np.ndarray], np.ndarray] | None, manifest: Manifest
) -> Callable[[np.ndarray], np.ndarray] | None:
    if manifest.on_host and confidence is None:
        raise ThresholdError(
            f"this model's confidence, {manifest.confidence!r}, is Python code that is not in its graphs; give it as "
            f"confidence=, from a numpy array of logits (b, K) to (b,) numbers"
        )
    if not manifest.on_host and confidence is not None:
        raise ThresholdError(
            f"confidence= is given, but the graphs hold {manifest.confidence!r}, to which thresholds belong; leave it "
            f"out"
        )
    return confidence


def _asked(confidence: Callable[[np.ndarray], np.ndarray], logits: np.ndarray) -> np.ndarray:
    found = np.asarray(confidence(logits))
    if found.shape != logits.shape[:1]:
        raise ThresholdError(
            f"confidence= gave shape {found.shape} for logits of shape {logits.shape}; it must give one number a sample"
        )
    return found


def _priced(stages: Sequence[Part]) -> list[list[tuple[Part, int]]]:
    """Each step's stages, and what each adds to a bill."""
    found, before = [], 0
    for row in steps(stages):
        found.append([(part, part.macs - before if part.adds is None else part.adds) for part in row])
        before = row[0].macs
    return found


def wanted(route: np.ndarray) -> np.ndarray:
    """(b,) the widths that a router wants, of its (b, widths) logits; of NaN the widest."""
    return np.where(np.isnan(route).any(1), route.shape[1] - 1, route.argmax(1))


def through(
    ways: Sequence[Opened], widths: np.ndarray | None, live: Mapping[str, np.ndarray]
) -> tuple[list[np.ndarray], Any]:
    """What a step makes of what is there, and what it adds to bills: one number, or one a sample.

    Args:
        ways: of each width.
        widths: (b,) of each sample; None where there is one way.
        live: tensors by name.
    """
    there = [0] if widths is None else np.unique(widths).tolist()
    if len(there) == 1:
        way = ways[there[0]]
        return way.session.run([live[port.name] for port in way.part.takes]), way.adds
    assert widths is not None
    places = [np.flatnonzero(widths == width) for width in there]
    made = [
        ways[width].session.run([_rows(live[port.name], here, port) for port in ways[width].part.takes])
        for width, here in zip(there, places, strict=True)
    ]
    back = np.concatenate(places).argsort()
    ports = [_EACH, _EACH, *ways[0].part.gives]
    whole = [
        _rows(np.concatenate(parts, port.dim), back, port)
        for port, parts in zip(ports, zip(*made, strict=True), strict=True)
    ]
    return whole, np.array([way.adds for way in ways])[widths]


_EACH = Port("", 0, 1)  # logits and confidence


def _rows(tensor: np.ndarray, kept: np.ndarray, port: Port) -> np.ndarray:
    """Those rows of a tensor that belong to samples which stay."""
    if port.per_sample != 1:
        kept = (kept[:, None] * port.per_sample + np.arange(port.per_sample)).ravel()
    return tensor[kept] if port.dim == 0 else np.ascontiguousarray(tensor.take(kept, port.dim))
