"""What the file of a model says besides its weights: one schema, against which it is checked once, after reading."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from dynnet.backbone.chain import Combine
from dynnet.backbone.host import Preparation
from dynnet.belongings import Threshold, Told
from dynnet.errors import CheckpointError, SchemaError
from dynnet.files.creation import not_architecture
from dynnet.gates.plan import GateConfig
from dynnet.pruning.shape import Shape
from dynnet.schema import between, typed

Side = Annotated[int, between(1, 2**14)]
_LONGEST = 16  # members of a cascade


@dataclass(frozen=True)
class Wrapping:
    """How a backbone was wrapped: as `dynnet.WrapConfig`, with names of exits and nothing left to be chosen."""

    exits: tuple[str, ...]
    gates: GateConfig | None
    head_share: float
    confidence: str
    input_size: tuple[Side, Side, Side]
    head_blocks: bool = False  # of files that do not say


@dataclass(frozen=True)
class Description:
    """What is needed to build a model again, and what belongs to it.

    Attributes:
        kind: "model" is a wrapped one.
        create: what `timm.create_model` is called with; without a name where that makes another model.
        backbone: what it is called.
        shape: what pruning had made of the backbone.
        folded: names of batch norms that are folded away.
        packed: shapes of the tensors that are written as bits and values.
        preparation: of images.
        versions: of the libraries that wrote the file.
        wrap: how it was wrapped.
        own_heads: are there heads that are not dynnet's?
        thresholds, calibration: of the exits.
        regions: what each gate network decides on: equal shapes do not mean that they switch the same layers; None
            where the file does not say.
    """

    kind: Literal["backbone", "model"]
    create: dict[str, Any]
    backbone: str = "backbone"
    shape: Shape = field(default_factory=Shape)
    folded: tuple[str, ...] = ()
    packed: dict[str, tuple[Annotated[int, between(0, 2**40)], ...]] = field(default_factory=dict)
    preparation: Preparation = field(default_factory=Preparation)
    versions: dict[str, str] = field(default_factory=dict)
    wrap: Wrapping | None = None
    own_heads: bool = False
    thresholds: tuple[Threshold, ...] = ()
    calibration: Told | None = None
    regions: tuple[tuple[str, tuple[int, ...]], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `description_of` reads back.

        Raises:
            CheckpointError: something in it has no such form.
        """
        told = {**asdict(self), "preparation": self.preparation.known()}
        try:
            _read(json.loads(json.dumps(told)))
        except (SchemaError, TypeError, ValueError) as error:
            raise CheckpointError(f"a file cannot say this of a model: {error}") from error
        return told


@dataclass(frozen=True)
class Row:
    """What a file says of a cascade.

    Attributes:
        members: what it would say of each, in order; the tensors of number i are named "members.i. ...".
        combine, confidence, input_sizes: as for `dynnet.cascade`.
        thresholds, calibration: of all exits.
    """

    kind: Literal["cascade"]
    members: tuple[Description, ...]
    combine: Combine
    confidence: str
    input_sizes: tuple[tuple[Side, Side, Side], ...]
    thresholds: tuple[Threshold, ...]
    calibration: Told | None = None

    def to_json(self) -> dict[str, Any]:
        """What `row_of` reads back; errors as for `Description.to_json`."""
        return {**asdict(self), "members": [member.to_json() for member in self.members]}


def row_of(about: dict[str, Any], path: str | Path) -> Row:
    """What a file says of its cascade.

    Raises:
        CheckpointError: it has another form.
    """
    members = about.get("members")
    if not isinstance(members, list) or not 2 <= len(members) <= _LONGEST or not all(map(_is_mapping, members)):
        raise CheckpointError(
            f"{str(path)!r} holds a cascade that is none of 2 to {_LONGEST} models; take another copy"
        )
    read = tuple(description_of(member, f"{path}, member {number}") for number, member in enumerate(members))
    try:
        found: Row = typed(Row, {**about, "members": []})
        if len(found.input_sizes) != len(read):
            raise SchemaError(f"it has {len(found.input_sizes)} sizes for {len(read)} members")
    except SchemaError as error:
        raise CheckpointError(f"{str(path)!r} says of its model what cannot be: {error}; take another copy") from error
    return replace(found, members=read)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def description_of(about: dict[str, Any], path: str | Path) -> Description:
    """What a file says of its model.

    Raises:
        CheckpointError: it is of another kind, or has another form.
    """
    kind = about.get("kind")
    if kind not in ("model", "backbone"):
        raise CheckpointError(f"{str(path)!r} holds a {kind}, not a model")
    if "create" not in about:
        raise CheckpointError(f"{str(path)!r} does not say how to build its backbone; save it again with dynnet.save")
    if about.get("int8"):
        raise CheckpointError(
            f"{str(path)!r} holds layers in int8, which are no longer read; export what it was made from: "
            f"dynnet.export(model, folder, int8=True, loader=loader)"
        )
    try:
        return _read(_of_today(about))
    except SchemaError as error:
        raise CheckpointError(f"{str(path)!r} says of its model what cannot be: {error}; take another copy") from error


def _read(about: Any) -> Description:
    """
    Raises:
        SchemaError: it has another form, or parts that do not fit each other.
    """
    found: Description = typed(Description, about)
    if found.create.get("model_name") is not None and (told := not_architecture(found.create)):
        raise SchemaError(f"create: {told}")
    if (found.kind == "model") != (found.wrap is not None):
        raise SchemaError(f"it is a {found.kind} {'with' if found.wrap else 'without'} 'wrap'")
    exits = () if found.wrap is None else found.wrap.exits
    if len(found.thresholds) != len(exits):
        raise SchemaError(f"it has {len(found.thresholds)} thresholds for {len(exits)} exits")
    return found


def _of_today(about: dict[str, Any]) -> dict[str, Any]:
    """What files of earlier versions said, as it is said now."""
    about = {key: value for key, value in about.items() if key != "int8"}
    wrap = about.get("wrap")
    if not isinstance(wrap, dict) or "heads" not in wrap:
        return about
    heads = wrap["heads"]
    return {**about, "own_heads": heads == "custom", "wrap": {k: v for k, v in wrap.items() if k != "heads"}}
