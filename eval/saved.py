"""Results that programs have saved as JSON, read back: what each must say, or be refused in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar, cast

from dynnet.errors import CheckpointError, SchemaError
from dynnet.schema import parse, typed

LARGEST = 10_000_000  # bytes
_DEEPEST = 20
_Kind = TypeVar("_Kind")


class Subject(TypedDict):
    """What was measured, on which images; only results that agree in it are compared."""

    model: str
    backbone_kwargs: dict[str, Any]
    dataset: str
    test_images: int


class Measured(TypedDict):
    """A model beside others, in `training.prune`."""

    accuracy: float
    macs: float
    sparsity: float
    size_bytes: int


class Settings(TypedDict):
    """How it was pruned."""

    method: str
    steps: int
    distill: float


class Pruned(Subject):
    """What `training.prune` found."""

    pruning: Settings
    epochs: int
    pruned: Measured
    int8: NotRequired[Measured]


class Hybrid(Subject):
    """What is needed of a report to stand beside another."""

    accuracy: float
    mean_macs: float
    dense_macs: float
    epochs: int


class Epochs(TypedDict):
    """What is needed of the run from which another has its backbone."""

    epochs: int


class Quantiles(TypedDict):
    p50: float
    p90: float
    p99: float


class Setting(TypedDict):
    device_name: str
    threads: int
    dtype: str
    folded: NotRequired[bool]


class Times(TypedDict):
    """As `dynnet.latency` sums them up."""

    calls: int
    dense_ms: Quantiles
    dynamic_ms: Quantiles
    speedup: float
    setting: Setting
    uncertain: list[str]


class OfExit(TypedDict):
    calls: int
    p50_ms: float


class Clocked(TypedDict):
    """Of a calibration for a time."""

    engine: str
    batch_size: int


class Shown(TypedDict):
    """What was shown of a risk: k of n samples failed."""

    of: str
    risk: float
    delta: float
    failures: int
    samples: int


class Calibrated(TypedDict):
    goal: str
    value: float
    samples: int
    clocked: NotRequired[Clocked | None]
    needed: NotRequired[int | None]
    certificate: NotRequired[Shown | None]


class Prices(TypedDict):
    segments: list[float]
    heads: list[float]
    unpriced: dict[str, Any]


class GatedRegion(TypedDict):
    layer: str
    units: int
    images: int
    open: float | None
    dead: float | None
    always: float | None
    differ: float | None
    masks: int


class Control(TypedDict):
    """The same gates, where they decide without looking."""

    name: str
    accuracy: float
    macs_share: float


class Gated(TypedDict):
    macs_share: float
    regions: list[GatedRegion]
    frozen_accuracy: float
    frozen_macs_share: float
    controls: NotRequired[list[Control]]


class Row(TypedDict):
    """A pruned model in a report."""

    name: str
    method: str
    accuracy: float
    macs_share: float
    sparsity: float
    size_bytes: int
    epochs: int
    dynamic: bool
    line: NotRequired[list[tuple[float, float]]]
    p50_ms: float | None
    speedup: float | None
    dynamic_accuracy: float | None
    dynamic_macs_share: float | None


class Beside(TypedDict):
    p50_ms: float
    speedup: float
    dense_ms: float


class OtherInEngine(TypedDict):
    """A pruned model, exported too."""

    name: str
    method: str
    accuracy: float
    epochs: int
    dynamic: bool
    ms: float


class InEngine(TypedDict):
    """As `eval.in_engine` finds it."""

    engine: str
    threads: int
    calls: int
    dense_ms: float
    ms: float
    leaving_ms: list[float]
    switched_off: list[str]
    static: list[OtherInEngine]
    left_out: list[str]
    notes: list[str]


class Report(Subject):
    """What `eval.report` found, from which its page is drawn again."""

    exits: list[str]
    thresholds: list[float | Literal["inf", "-inf"]]
    confidence: str
    calibration: Calibrated | None
    accuracy: float
    dense_accuracy: float
    mean_macs: float
    dense_macs: float
    macs_share: float
    mean_flops: float
    dense_flops: float
    exit_rates: list[float]
    accuracy_of_each_exit: list[float]
    ledger: Prices
    latency: Times
    latency_by_exit: dict[str, OfExit]
    epochs: NotRequired[int]
    gates: NotRequired[Gated | None]
    every_vote: NotRequired[bool]
    points: NotRequired[list[list[float | Literal["inf", "-inf"]]]]
    static: NotRequired[list[Row]]
    static_timing: NotRequired[Beside]
    engine: NotRequired[InEngine | None]
    engine_reason: NotRequired[str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of figures.

    Raises:
        CheckpointError: it is missing, too large, or something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise CheckpointError(f"{str(path)!r} has more than {LARGEST} bytes; are they results?")
        found = parse(content.decode(), finite=False)
        if not isinstance(found, dict):
            raise SchemaError("it holds no keys and values")
        if _deeper(found, _DEEPEST):
            raise SchemaError(f"more than {_DEEPEST} mappings and lists within each other")
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (UnicodeDecodeError, SchemaError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}; write it anew") from error
    return found


def checked(kind: type[_Kind], found: Mapping[str, Any], path: Path) -> _Kind:
    """The same figures, if they say what a kind of results has to say.

    Raises:
        CheckpointError: a figure is missing, or something else than a figure.
    """
    try:
        known = typed(kind, found, error=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}; write it anew") from error
    return cast(_Kind, known)


def read_report(path: Path) -> dict[str, Any]:
    """The results of a report, from which its page can be drawn.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    found = checked(Report, read_json(path), path)
    exits, static = len(found["exits"]), found.get("static", [])
    ledger = found["ledger"]
    rows: list[tuple[str, list[Any], int]] = [
        ("thresholds", found["thresholds"], exits),
        ("exit_rates", found["exit_rates"], exits + 1),
        ("accuracy_of_each_exit", found["accuracy_of_each_exit"], exits + 1),
        ("ledger.segments", ledger["segments"], exits + 1),
        ("ledger.heads", ledger["heads"], exits),
    ]
    engine = found.get("engine")
    rows += [] if engine is None else [("engine.leaving_ms", engine["leaving_ms"], exits + 1)]
    for name, values, count in rows:
        if len(values) != count:
            raise CheckpointError(f"{str(path)!r} is damaged: {name} has {len(values)} entries for {exits} exits")
    timed = [found["static_timing"]["speedup"]] if "static_timing" in found else []
    timed += [row["speedup"] for row in static if row["speedup"] is not None]
    timed += [] if engine is None else [engine["dense_ms"], engine["ms"], *(row["ms"] for row in engine["static"])]
    lonely = "static_timing" in found and not static
    if lonely or min([found["dense_macs"], *timed]) <= 0:
        raise CheckpointError(f"{str(path)!r} is damaged: what it was compared with costs nothing, or is not there")
    return cast(dict[str, Any], found)


def _deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inside) and (levels == 0 or any(_deeper(one, levels - 1) for one in inside))
