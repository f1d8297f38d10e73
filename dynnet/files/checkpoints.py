"""Models in files: weights, and all that is needed to build a model again. `bundles.py` says what such files are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dynnet.backbone.chain import Chain
from dynnet.backbone.masks import not_plain
from dynnet.cascading import cascade, members_of
from dynnet.errors import CheckpointError, DynnetError
from dynnet.exits.heads import HeadFactory
from dynnet.exits.threshold import to_json
from dynnet.files import hub
from dynnet.files.building import File, Own, check_confidence, describe, loaded, tell_void
from dynnet.files.bundles import read_bundle, write_bundle
from dynnet.files.creation import not_architecture, timm_name
from dynnet.files.description import Description, Row, description_of, row_of
from dynnet.files.packed import outline, pack
from dynnet.gates.routers import Routers
from dynnet.model import STATE, DynamicModel


def save(
    model: nn.Module,
    path: str | Path,
    create: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    sparse: bool = False,
) -> None:
    """Save a model: weights, and all that is needed to build it again.

    >>> import timm, torch, tempfile
    >>> model = timm.create_model("cifar_resnet20", num_classes=5).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/model.safetensors")
    ...     again = load(f"{folder}/model.safetensors")
    >>> images = torch.randn(2, 3, 32, 32)
    >>> torch.equal(again(images), model(images))
    True

    Args:
        model: a wrapped model, with its configuration, its thresholds and what they were fitted on (its heads must be
            dynnet's own if the file is to be loaded without further arguments); or a plain one. Either may be pruned,
            or folded.
        path: of the file to write, usually called something.safetensors.
        create: arguments of `timm.create_model` that make the architecture; by default its name, with the tag of its
            pretrained weights, and its number of classes. A warning says so where these make a model of other parts,
            settings or widths, or one that answers an image otherwise: the model is built from them to compare. Of a
            cascade, a list of them, for each member.
        sparse: write tensors with many zeros as bits and values; reading takes no option.

    Raises:
        CheckpointError: a folded model of several widths; some weights are masked, or no plain parameters for another
            reason; `create` says more than an architecture; or what belongs to the model, its classes' names say, has a
            form that no file has.
    """
    if told := not_plain(model):
        raise CheckpointError(told)
    if isinstance(model, DynamicModel) and isinstance(model.gates, Routers) and len(model.gates.copies):
        raise CheckpointError(
            "a model of several widths that is folded has copies of its weights; save what it was folded from, and "
            "fold it again when it is loaded"
        )
    if isinstance(model, DynamicModel) and isinstance(model.backbone, Chain):
        row, tensors = _row_of(model, create, sparse)
        write_bundle(path, tensors, row.to_json())
        return
    if create is not None and not isinstance(create, Mapping):
        raise CheckpointError(f"create={create!r}: give the arguments of one architecture; several are a cascade's")
    description, tensors = _part_of(model, create, sparse)
    write_bundle(path, tensors, description.to_json())


def _part_of(
    model: nn.Module, create: Mapping[str, Any] | None, sparse: bool
) -> tuple[Description, Mapping[str, Tensor]]:
    """What a file says of one model, and its tensors as they are written."""
    backbone = model.backbone if isinstance(model, DynamicModel) else model
    made = dict(create or {"model_name": timm_name(backbone), "num_classes": getattr(model, "num_classes", None)})
    if create is not None and (told := not_architecture(made)):
        raise CheckpointError(f"create={made}: {told}; give what makes the architecture")
    description = describe(model, backbone, made)
    tensors: Mapping[str, Tensor] = {k: t for k, t in model.state_dict().items() if k != STATE}
    if sparse:
        tensors, packed = pack(tensors)
        description = replace(description, packed=packed)
    return description, tensors


def _row_of(
    model: DynamicModel, create: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, sparse: bool
) -> tuple[Row, Mapping[str, Tensor]]:
    """The same of a cascade: of each member in its turn, and of all together."""
    chain, members = model.backbone, members_of(model)
    assert isinstance(chain, Chain)
    given = [None] * len(members) if create is None else create
    if isinstance(given, Mapping) or len(given) != len(members):
        raise CheckpointError(
            f"create={create!r}: a cascade of {len(members)} wants arguments for each member, in a list"
        )
    parts = [_part_of(member, made, sparse) for member, made in zip(members, given, strict=True)]
    row = Row(
        kind="cascade",
        members=tuple(description for description, _ in parts),
        combine=chain.combine,
        confidence=model.config.confidence,
        input_sizes=chain.sizes,
        thresholds=tuple(to_json(t) for t in model.thresholds),
        calibration=model.calibration,
    )
    return row, {f"members.{i}.{name}": t for i, (_, tensors) in enumerate(parts) for name, t in tensors.items()}


def load(
    path: str | Path,
    backbone: nn.Module | None = None,
    heads: HeadFactory | None = None,
    confidence: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Load whatever `save` saved, in eval mode; in the type of its weights, where the backbone is created.

    A file is only data: loading it asks no server, opens no other file, runs nothing that it says, and takes no more
    memory than its model, whoever made it. That of an address of the hub is fetched first, then read like any other.

    >>> import timm, tempfile, dynnet
    >>> model = dynnet.wrap(timm.create_model("cifar_resnet20"), exits=["layer1"])
    >>> model.thresholds = [0.9]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dynnet.save(model, f"{folder}/model.safetensors")
    ...     again = load(f"{folder}/model.safetensors")
    >>> again.exits, again.thresholds
    (('layer1',), (0.9,))

    Args:
        path: the file, or "hf-hub:OWNER/NAME@REVISION", see `dynnet.files.hub`.
        backbone: to be used instead of creating one; must be like the one that was saved, or, where timm makes it, like
            it was before it was pruned.
        heads, confidence: what `wrap` was given, if the model has some of the user's own.

    Returns:
        A `DynamicModel`, or a plain model, as the file holds it.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    if isinstance(path, str) and path.startswith(hub.PREFIX):
        path = hub.fetched(path)
    tensors, said = read_bundle(path)
    own = Own(heads, confidence)
    if said.get("kind") == "cascade":
        if backbone is not None:
            raise CheckpointError(
                f"{str(path)!r} holds a cascade, which has no backbone of one piece; leave out backbone="
            )
        return _in_a_row(row_of(said, path), tensors, path, own).eval()
    return loaded(_outlined(tensors, description_of(said, path), path), backbone, own).eval()


def _outlined(tensors: Mapping[str, Tensor], about: Description, path: str | Path) -> File:
    try:
        return File(str(path), tensors, outline(tensors, about.packed), about)
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}; take another copy") from error


def _in_a_row(row: Row, tensors: Mapping[str, Tensor], path: str | Path, own: Own) -> DynamicModel:
    """The cascade of a file."""
    members = []
    for number, about in enumerate(row.members):
        prefix = f"members.{number}."
        mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        members.append(loaded(_outlined(mine, about, f"{path}, member {number}"), None, own).eval())
    check_confidence(row.confidence, own, path)
    try:
        model = cascade(
            members,
            combine=row.combine,
            confidence=own.confidence or row.confidence,
            input_sizes=row.input_sizes,
        )
        model.thresholds = [float(t) for t in row.thresholds]
    except DynnetError as error:
        raise CheckpointError(f"{str(path)!r} holds models that cannot stand in a row: {error}") from error
    model.calibration = row.calibration
    tell_void(model, path)
    return model
