"""What a file says of a model, and a model of what a file says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from dynnet.backbone.host import Preparation, preparation_of, prepare_
from dynnet.backbone.input_size import input_size_of
from dynnet.backbone.masks import not_plain
from dynnet.backbone.names import title
from dynnet.backbone.twin import meta_twin
from dynnet.certificate import void_certificate
from dynnet.deploy.folding import fold_again_, folded_norms
from dynnet.errors import CheckpointError, DynnetError, PruneError, SchemaError
from dynnet.exits.confidence import MEASURES
from dynnet.exits.heads import ExitHead, HeadFactory
from dynnet.exits.threshold import to_json
from dynnet.files.creation import Most, fresh_of, give_memory_, hollow
from dynnet.files.description import Description, Wrapping
from dynnet.files.likeness import other_answer, other_parts
from dynnet.files.packed import unpack
from dynnet.files.weights import check_weights, load_weights_, unlike
from dynnet.model import DynamicModel
from dynnet.pruning.shape import Shape, bring_into_shape_, shape_of
from dynnet.wrapping import wrap


class File(NamedTuple):
    """What was read.

    Attributes:
        path: of the file.
        packed: tensors as they are written.
        outline: all tensors, those that are packed without numbers.
        about: what the file says besides.
    """

    path: str
    packed: Mapping[str, Tensor]
    outline: Mapping[str, Tensor]
    about: Description


class Own(NamedTuple):
    """What only its user knows of a model."""

    heads: HeadFactory | None
    confidence: Callable[[Tensor], Tensor] | None


def describe(model: nn.Module, backbone: nn.Module, create: dict[str, Any]) -> Description:
    """What a file will say of a model; without a name where timm would make another backbone of it, with a warning."""
    fresh = fresh_of(create)
    plain = Description(
        kind="backbone",
        create=create,
        backbone=title(backbone),
        shape=Shape() if fresh is None else shape_of(backbone, fresh),
        folded=tuple(folded_norms(backbone)),
        preparation=Preparation(**preparation_of(backbone)),
        versions={"timm": timm.__version__, "torch": torch.__version__.split("+")[0]},
    )
    if fresh is None:
        plain = replace(plain, create={"model_name": None})
    elif other := other_parts(backbone, fresh, plain.shape) or _other_answer(model, backbone, plain):
        warnings.warn(
            f"timm.create_model(**{create}) makes another model than this {title(backbone)}: {other}. Save it with "
            f"create=, the arguments that make it, or load it with backbone=",
            stacklevel=3,
        )
        plain = replace(plain, create={"model_name": None})
    if not isinstance(model, DynamicModel):
        return plain
    return replace(
        plain,
        kind="model",
        folded=tuple(folded_norms(model)),
        wrap=Wrapping(**{f.name: getattr(model.config, f.name) for f in fields(Wrapping)}),
        own_heads=not all(isinstance(head, ExitHead) for head in model.heads),
        thresholds=tuple(to_json(t) for t in model.thresholds),
        calibration=model.calibration,
        regions=_regions(model),
    )


def _other_answer(model: nn.Module, backbone: nn.Module, description: Description) -> str | None:
    """Where a backbone answers otherwise than what its description makes of the same tensors, in words."""
    tensors = {name: tensor.cpu() for name, tensor in backbone.state_dict().items()}
    try:
        again = loaded(File(description.backbone, tensors, tensors, description), None, Own(None, None))
    except CheckpointError as error:
        return str(error)
    size = model.input_size if isinstance(model, DynamicModel) else input_size_of(backbone)
    return other_answer(backbone, again, size)


def loaded(file: File, backbone: nn.Module | None, own: Own) -> nn.Module:
    """The model of a file, as `load` gives it, but for its mode."""
    about = file.about
    build = _plain if about.wrap is None else _wrapped
    if backbone is None:
        model = build(file, _created(file), own)
        _retype(model, file.outline)
    else:
        # On a copy without numbers: a backbone that does not fit is left untouched.
        build(file, _shaped(file, meta_twin(backbone)), own)
        model = build(file, _shaped(file, backbone), own)
    load_weights_(model, unpack(file.packed, about.packed), file.path)
    prepare_(model.backbone if isinstance(model, DynamicModel) else model, about.preparation.known())
    if isinstance(model, DynamicModel):
        model.thresholds = [float(t) for t in about.thresholds]
        model.calibration = about.calibration
        tell_void(model, file.path)
    return model


def tell_void(model: DynamicModel, path: str | Path) -> None:
    """Warn where a file has a certificate that does not hold for its model."""
    try:
        void = void_certificate(model)
    except SchemaError as error:
        raise CheckpointError(f"{str(path)!r} says of its thresholds what cannot be: {error}") from error
    if void:
        warnings.warn(f"the certificate of {str(path)!r} is void: {void}; call dynnet.calibrate again", stacklevel=4)


def check_confidence(name: str, own: Own, path: str | Path) -> None:
    """
    Raises:
        CheckpointError: it is the user's own, and is not given.
    """
    if name not in MEASURES and own.confidence is None:
        raise CheckpointError(f"{str(path)!r} has a confidence measure of its own, {name!r}; pass it as confidence=")


def _created(file: File) -> nn.Module:
    """The backbone of a file as timm makes it, in shape, with weights of no meaning. Memory is there for what the file
    has numbers for, and for no more."""
    create = file.about.create
    try:
        if create.get("model_name") is None:
            raise ValueError("timm has no such model")
        backbone = hollow(create, Most.beside(file.outline))
    except ValueError as error:
        raise CheckpointError(
            f"timm cannot create the backbone of {file.path!r}, {create}: {error}; pass it as backbone="
        ) from error
    prefix = "" if file.about.wrap is None else "backbone."
    tensors = {n.removeprefix(prefix): t for n, t in file.outline.items() if n.startswith(prefix)}
    folded = {n.removeprefix(prefix) for n in file.about.folded}
    _shaped(file, backbone)
    for name, parameter in backbone.named_parameters():
        layer = name.rpartition(".")[0]
        there = tensors.get(name)
        told = None if there is None else unlike(name, there, parameter)
        if told or (there is None and layer not in folded):
            raise CheckpointError(f"{file.path!r} is of another model: {told or f'it lacks {name!r}'}")
    give_memory_(backbone, tensors)
    return backbone


def _shaped(file: File, backbone: nn.Module) -> nn.Module:
    """A backbone, brought into the shape of a file's, in place; errors as for `load`."""
    about = file.about
    if told := not_plain(backbone):
        raise CheckpointError(f"{file.path!r} cannot be loaded into the given backbone: {told}")
    try:
        bring_into_shape_(backbone, about.shape)
    except PruneError as error:
        raise CheckpointError(
            f"{file.path!r} holds a pruned {about.backbone}, and this backbone cannot be brought into its shape: "
            f"{error}; it was saved with {about.versions}, this is timm {timm.__version__}"
        ) from error
    return backbone


def _plain(file: File, backbone: nn.Module, own: Own) -> nn.Module:
    """The plain model of a file, ready for its weights; errors as for `load`."""
    _as_saved(backbone, file)
    return backbone


def _wrapped(file: File, backbone: nn.Module, own: Own) -> nn.Module:
    """The wrapped model of a file, ready for its weights; errors as for `load`."""
    about, settings = file.about, file.about.wrap
    assert settings is not None
    if about.own_heads and own.heads is None:
        raise CheckpointError(f"{file.path!r} has heads of its own making; pass the factory as heads=")
    check_confidence(settings.confidence, own, file.path)
    given = {f.name: getattr(settings, f.name) for f in fields(Wrapping)}
    given["confidence"] = own.confidence or settings.confidence
    try:
        model = wrap(backbone, heads=own.heads, **given)
    except DynnetError as error:
        raise CheckpointError(
            f"{file.path!r} was saved for {about.backbone}, which does not fit the given backbone: {error}"
        ) from error
    try:
        if about.regions not in (None, _regions(model)):
            raise CheckpointError(
                f"{file.path!r} has gates for regions {about.regions}, here they would be {_regions(model)}; it was "
                f"saved with {about.versions}"
            )
        _as_saved(model, file)
    except CheckpointError:
        model.unwrap()
        raise
    return model


def _as_saved(model: nn.Module, file: File) -> None:
    """Fold what was folded, in place; then the weights fit."""
    about = file.about
    try:
        fold_again_(model, about.folded, file.outline.keys())
    except CheckpointError as error:
        raise CheckpointError(
            f"{file.path!r} was saved folded, which this {about.backbone} cannot be: {error}; it was saved "
            f"with {about.versions}"
        ) from error
    check_weights(model, file.outline, file.path)


def _retype(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's tensors the types of those that it will be given."""
    for name, own in model.state_dict(keep_vars=True).items():
        if name in tensors:
            own.data = own.data.to(tensors[name].dtype)


def _regions(model: DynamicModel) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What each gate network decides."""
    return () if model.gates is None else tuple((r.layer, tuple(r.groups)) for r in model.gates.plan.regions)
