"""Models in files: weights, and all that is needed to build a model again. `bundles.py` says what such files are."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from dynnet.backbone.host import preparation_of, prepare_
from dynnet.backbone.masks import not_plain
from dynnet.backbone.names import title
from dynnet.backbone.twin import meta_twin
from dynnet.deploy.folding import fold_again_, folded_norms
from dynnet.deploy.int8 import int8_layers, put_int8_
from dynnet.errors import CheckpointError, DynnetError, PruneError
from dynnet.exits.confidence import MEASURES, to_json
from dynnet.exits.heads import ExitHead, HeadFactory
from dynnet.files.bundles import read_bundle, write_bundle
from dynnet.files.creation import difference, fresh_of, timm_name
from dynnet.files.packed import pack, unpack
from dynnet.files.weights import check_weights, load_weights_
from dynnet.gates.plan import GateConfig
from dynnet.model import STATE, DynamicModel
from dynnet.pruning.shape import UNCHANGED, bring_into_shape_, shape_of
from dynnet.wrapping import wrap


def save(model: nn.Module, path: str | Path, create: Mapping[str, Any] | None = None, *, sparse: bool = False) -> None:
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
            folded, or in int8.
        path: of the file to write, usually named *.safetensors.
        create: arguments of `timm.create_model` that make the backbone; by default its name, with the tag of its
            pretrained weights, and its number of classes. A warning says so where these make a model of other parts,
            settings or widths.
        sparse: write tensors with many zeros as bits and values; reading takes no option.

    Raises:
        CheckpointError: some weights are masked, or no plain parameters for another reason.
    """
    if told := not_plain(model):
        raise CheckpointError(told)
    backbone = model.backbone if isinstance(model, DynamicModel) else model
    create = dict(create or {"model_name": timm_name(backbone), "num_classes": getattr(model, "num_classes", None)})
    fresh = fresh_of(create)
    shape = UNCHANGED if fresh is None else shape_of(backbone, fresh)
    if fresh is not None and (other := difference(backbone, fresh, shape)):
        warnings.warn(
            f"timm.create_model(**{create}) makes another model than this {title(backbone)}: {other}. Save it with "
            f"create=, the arguments that make it, or load it with backbone=",
            stacklevel=2,
        )
        create = {"model_name": None}
    about: dict[str, Any] = {
        "kind": "backbone",
        "backbone": title(backbone),
        "create": create,
        "shape": shape,
        "folded": folded_norms(model),
        "int8": int8_layers(model),
        "preparation": preparation_of(backbone),
        "versions": {"timm": timm.__version__, "torch": torch.__version__.split("+")[0]},
    }
    if isinstance(model, DynamicModel):
        about |= {
            "kind": "model",
            "wrap": dataclasses.asdict(model.config),
            "own_heads": not all(isinstance(head, ExitHead) for head in model.heads),
            "thresholds": [to_json(t) for t in model.thresholds],
            "calibration": model.calibration,
            "regions": _regions(model),
        }
    tensors: Mapping[str, Tensor] = {k: t for k, t in model.state_dict().items() if k != STATE}
    if sparse:
        tensors, about["packed"] = pack(tensors)
    write_bundle(path, tensors, about)


def load(
    path: str | Path,
    backbone: nn.Module | None = None,
    heads: HeadFactory | None = None,
    confidence: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Load whatever `save` saved, in eval mode; in the type of its weights, where the backbone is created.

    >>> import timm, tempfile, dynnet
    >>> model = dynnet.wrap(timm.create_model("cifar_resnet20"), exits=["layer1"])
    >>> model.thresholds = [0.9]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dynnet.save(model, f"{folder}/model.safetensors")
    ...     again = load(f"{folder}/model.safetensors")
    >>> again.exits, again.thresholds
    (('layer1',), (0.9,))

    Args:
        path: the file.
        backbone: to be used instead of creating one; must be like the one that was saved, or, where timm makes it, like
            it was before it was pruned.
        heads, confidence: what `wrap` was given, if the model has some of the user's own.

    Returns:
        A `DynamicModel`, or a plain model, as the file holds it.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    file = _read(path)
    build = _wrapped if file.about["kind"] == "model" else _plain
    own = _Own(heads, confidence)
    if backbone is not None:
        # On a copy without numbers: a backbone that does not fit is left untouched.
        build(file, meta_twin(backbone), own)
    model = build(file, backbone, own)
    if backbone is None:
        _retype(model, file.tensors)
    load_weights_(model, file.tensors, path)
    preparation = file.about.get("preparation")
    if preparation:
        prepare_(model.backbone if isinstance(model, DynamicModel) else model, preparation)
    if isinstance(model, DynamicModel):
        model.thresholds = [float(t) for t in file.about["thresholds"]]
        model.calibration = file.about["calibration"]
    return model.eval()


class _File(NamedTuple):
    path: str
    tensors: dict[str, Tensor]
    about: dict[str, Any]


class _Own(NamedTuple):
    """What only its user knows of a model."""

    heads: HeadFactory | None
    confidence: Callable[[Tensor], Tensor] | None


def _read(path: str | Path) -> _File:
    tensors, about = read_bundle(path)
    if about.get("kind") not in ("model", "backbone"):
        raise CheckpointError(f"{str(path)!r} holds a {about.get('kind')}, not a model")
    if "create" not in about:
        raise CheckpointError(f"{str(path)!r} does not say how to build its backbone; save it again with dynnet.save")
    if about.get("packed"):
        try:
            tensors = unpack(tensors, about["packed"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}; take another copy") from error
    return _File(str(path), tensors, about)


def _wrapped(file: _File, backbone: nn.Module | None, own: _Own) -> DynamicModel:
    """The wrapped model of a file, ready for its weights; errors as for `load`."""
    settings = file.about["wrap"]
    if (file.about.get("own_heads") or settings.get("heads") == "custom") and own.heads is None:
        raise CheckpointError(f"{file.path!r} has heads of its own making; pass the factory as heads=")
    if settings["confidence"] not in MEASURES and own.confidence is None:
        raise CheckpointError(
            f"{file.path!r} has a confidence measure of its own, {settings['confidence']!r}; pass it as confidence="
        )
    built = _built(file, backbone)
    try:
        model = wrap(
            built,
            settings["exits"],
            gates=_gates(settings.get("gates")),
            heads=own.heads,
            head_share=settings["head_share"],
            confidence=own.confidence or settings["confidence"],
            input_size=tuple(settings["input_size"]),
        )
    except DynnetError as error:
        raise CheckpointError(
            f"{file.path!r} was saved for {file.about['backbone']}, which does not fit the given backbone: {error}"
        ) from error
    try:
        if file.about.get("regions", _regions(model)) != _regions(model):
            raise CheckpointError(
                f"{file.path!r} has gates for regions {file.about['regions']}, here they would be {_regions(model)}; "
                f"it was saved with {file.about['versions']}"
            )
        _as_saved(model, file)
    except CheckpointError:
        model.unwrap()
        raise
    return model


def _plain(file: _File, backbone: nn.Module | None, own: _Own) -> nn.Module:
    """The plain model of a file, ready for its weights; errors as for `load`."""
    built = _built(file, backbone)
    _as_saved(built, file)
    return built


def _built(file: _File, given: nn.Module | None) -> nn.Module:
    """The backbone of a file, or the one that is given, in shape, with weights of no meaning."""
    about, backbone = file.about, given
    if backbone is not None and (told := not_plain(backbone)):
        raise CheckpointError(f"{file.path!r} cannot be loaded into the given backbone: {told}")
    if backbone is None:
        try:
            if not timm.is_model(about["create"]["model_name"] or ""):
                raise ValueError("timm has no such model")
            backbone = timm.create_model(**about["create"])
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"timm cannot create the backbone of {file.path!r}, {about['create']}: {error}; pass it as backbone="
            ) from error
    shape = about.get("shape")
    if not shape or shape == UNCHANGED:
        return backbone
    try:
        bring_into_shape_(backbone, shape)
    except PruneError as error:
        raise CheckpointError(
            f"{file.path!r} holds a pruned {about['backbone']}, and this backbone cannot be brought into its shape: "
            f"{error}; it was saved with {about['versions']}, this is timm {timm.__version__}"
        ) from error
    return backbone


def _as_saved(model: nn.Module, file: _File) -> None:
    """Fold what was folded, and make int8 what was, in place; then the weights fit."""
    try:
        if file.about.get("folded"):
            fold_again_(model, file.about["folded"], file.tensors.keys())
        put_int8_(model, dict.fromkeys(file.about.get("int8", ()), (0.0, 1.0)))
    except CheckpointError as error:
        raise CheckpointError(
            f"{file.path!r} was saved folded or in int8, which this {file.about['backbone']} cannot be: {error}; it "
            f"was saved with {file.about['versions']}"
        ) from error
    check_weights(model, file.tensors, file.path)


def _retype(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's tensors the types of those that it will be given."""
    for name, own in model.state_dict(keep_vars=True).items():
        if name in tensors:
            own.data = own.data.to(tensors[name].dtype)


def _regions(model: DynamicModel) -> list[list[Any]]:
    """What each gate network decides, as JSON: equal shapes do not mean that they switch the same layers."""
    return [] if model.gates is None else [[r.layer, list(r.groups)] for r in model.gates.plan.regions]


def _gates(settings: Mapping[str, Any] | None) -> GateConfig | None:
    return None if settings is None else GateConfig(settings["unit"], settings["blocks"], tuple(settings["exclude"]))
