"""What the folder of an exported model says: its stages, how they hang together, what they cost. Without torch."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from dynnet.errors import ExportError, SchemaError
from dynnet.schema import between, parse, typed

NAME = "manifest.json"
FORMAT = 2
_LARGEST = 10_000_000  # bytes

Whole = Annotated[int, between(0, 2**40)]
Plain = None | bool | int | float | str


@dataclass(frozen=True)
class Port:
    """A tensor that a stage takes or gives.

    Attributes:
        name: in the graph.
        dim: its dimension of the batch,
        per_sample: entries of which belong to one sample.
    """

    name: str
    dim: Whole
    per_sample: Whole


@dataclass(frozen=True)
class Part:
    """A stage, or one of several widths that it has.

    Attributes:
        file: its graph, in the engine's format, with outputs (logits, confidence, *gives).
        sha256: of the file.
        takes, gives: what it reads, and what it makes for later stages.
        exit: the number of the exit at its end; E for the backbone's own head.
        macs: of a sample that answers there, alone; where stages have widths, of one that had this one all the way.
        adds: of those, what this stage adds; None in files of before, where stages have one width.
        width: which of the widths it is, from the narrowest; None where there is one.
        answers: does the exit answer? Else logits and confidence mean nothing: only a router stands there.
        route: which of `gives` says how wide a sample goes on: (b, widths), of which the largest counts.
    """

    file: str
    sha256: str
    takes: tuple[Port, ...]
    gives: tuple[Port, ...]
    exit: Whole
    macs: Whole
    adds: Whole | None = None
    width: Whole | None = None
    answers: bool = True
    route: str | None = None


@dataclass(frozen=True)
class Quantized:
    """What was found when stages were put into int8.

    Attributes:
        range_images: so many images told the ranges of tensors.
        images: so many images, those among them, told thresholds and agreement.
        agreement: share of them that get the same class as in float, each from the exit at which it leaves.
        float_thresholds: what the thresholds were in float.
    """

    range_images: Whole
    images: Whole
    agreement: float
    float_thresholds: tuple[float | Literal["inf", "-inf"], ...]


@dataclass(frozen=True)
class Manifest:
    """An exported model.

    Attributes:
        engine: that its stages were made for.
        model: what the backbone is called.
        exits: names of all E exits. Those that were switched off have no stage.
        thresholds: E of them; they are no part of the graphs.
        confidence: name of the measure.
        on_host: is it Python code that no graph holds, so that the runner has to be given it?
        stages: in running order.
        dense_macs: of the bare backbone.
        input_size: (C, H, W) of the images.
        dtype: of the images.
        classes: K.
        preparation: of images, and the names of classes.
        calibration: what the thresholds were fitted on and for.
        versions: of what made it.
        differences: between the engine's answers and PyTorch's, the largest on images of noise, by stage, in float.
        precision: of the stages.
        quantized: of stages in int8, how they differ from float ones.
    """

    format: Literal[1, 2]
    engine: str
    model: str
    exits: tuple[str, ...]
    thresholds: tuple[float | Literal["inf", "-inf"], ...]
    confidence: str
    on_host: bool
    stages: tuple[Part, ...]
    dense_macs: Whole
    input_size: tuple[Whole, Whole, Whole]
    dtype: str
    classes: Whole
    preparation: dict[str, Plain | tuple[Plain, ...]] = field(default_factory=dict)
    calibration: dict[str, Plain | tuple[Plain, ...] | dict[str, Plain]] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    differences: tuple[dict[str, float], ...] = ()
    precision: Literal["float32", "int8"] = "float32"
    quantized: Quantized | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """K names, where the model knows them."""
        names = self.preparation.get("label_names")
        return tuple(str(name) for name in names) if isinstance(names, tuple) else None

    def voided(self, why: str) -> Manifest:
        """The same without the certificate of its thresholds, if it has one, and with the reason in words."""
        said = self.calibration
        if said is None or said.get("certificate") is None:
            return self
        return replace(self, calibration={**said, "certificate": None, "void": why})

    def write(self, folder: Path) -> None:
        """Write it into a folder, beside its stages."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """What a folder says, if its files are as they were written.

    Raises:
        ExportError: there is none, it is damaged, of another version, or a file is missing or has changed.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise ExportError(
            f"{str(folder)!r} holds no exported model: {path.name}: {error.strerror}; make one with dynnet.export"
        ) from error
    try:
        if len(content) > _LARGEST:
            raise SchemaError(f"it has more than {_LARGEST} bytes")
        said = parse(content.decode())
        if isinstance(said, dict) and isinstance(said.get("format"), int) and said["format"] > FORMAT:
            raise ExportError(
                f"{str(path)!r} has format {said['format']}, this dynnet reads up to {FORMAT}; upgrade dynnet"
            )
        found: Manifest = typed(Manifest, said)
        _check(found)
    except (SchemaError, UnicodeDecodeError) as error:
        raise ExportError(f"{str(path)!r} is damaged: {error}; export the model again") from error
    for stage in found.stages:
        _check_file(folder, stage)
    return found


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(found: Manifest) -> None:
    """
    Raises:
        SchemaError: parts that do not fit each other.
    """
    rows = steps(found.stages)
    numbers = [row[0].exit for row in rows]
    if not numbers or numbers != sorted(set(numbers)) or numbers[-1] != len(found.exits):
        raise SchemaError(f"stages end at exits {numbers}, of {len(found.exits)}")
    _check_widths(rows)
    if len(found.thresholds) != len(found.exits):
        raise SchemaError(f"{len(found.thresholds)} thresholds for {len(found.exits)} exits")
    made = {port.name for port in found.stages[0].takes}
    for stage in found.stages:
        if Path(stage.file).name != stage.file:
            raise SchemaError(f"stage file {stage.file!r} is not in the folder")
        if missing := [port.name for port in stage.takes if port.name not in made]:
            raise SchemaError(f"nothing gives {missing[0]!r}, which {stage.file} takes")
        made |= {port.name for port in stage.gives}


def _check_widths(rows: Sequence[Sequence[Part]]) -> None:
    """
    Raises:
        SchemaError: widths of a stage that do not stand for each other, or that nobody chooses between.
    """
    route: str | None = None
    for row in rows:
        if [part.width for part in row] != ([None] if len(row) == 1 else list(range(len(row)))):
            raise SchemaError(f"{row[0].file} has widths {[part.width for part in row]}")
        if len(row) > 1 and route is None:
            raise SchemaError(f"nothing says which of {row[0].file} and the others to take")
        alike = {(part.takes, part.gives, part.answers, part.route) for part in row}
        if len(alike) > 1:
            raise SchemaError(f"{row[0].file} takes or gives something else than its other widths")
        route = row[0].route
        if route is not None and route not in [port.name for port in row[0].gives]:
            raise SchemaError(f"{row[0].file} does not give {route!r}")


def steps(stages: Sequence[Part]) -> list[list[Part]]:
    """The stages in running order, each with all of its widths."""
    return [list(row) for _, row in itertools.groupby(stages, key=lambda part: part.exit)]


def _check_file(folder: Path, stage: Part) -> None:
    path = folder / stage.file
    if not path.is_file():
        raise ExportError(f"{str(path)!r} is missing; export the model again")
    if digest_of_file(path) != stage.sha256:
        raise ExportError(
            f"{str(path)!r} is damaged, or was changed: its SHA-256 does not match; export the model again"
        )


def later_use(stages: Sequence[Part]) -> list[Mapping[str, Port]]:
    """For each step, what is needed behind it: what its route says, and the tensors that stages after it take."""
    needed: list[Mapping[str, Port]] = []
    rows = steps(stages)
    for number, row in enumerate(rows):
        taken = {port.name: port for later in rows[number + 1 :] for part in later for port in part.takes}
        needed.append(taken | {port.name: port for port in row[0].gives if port.name == row[0].route})
    return needed
