"""Models in files: weights, and all that is needed to build a model again. `dynnet.bundle` says what such files are."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from dynnet.backbone.dry_run import on_meta
from dynnet.backbone.masks import not_plain
from dynnet.backbone.names import is_inside, title
from dynnet.deploy.folding import FoldedNorm, fold_again, folded_norms
from dynnet.deploy.int8 import Int8Layer, int8_layers, put_int8
from dynnet.errors import CheckpointError, DynnetError, PruneError
from dynnet.exits.confidence import to_json
from dynnet.exits.heads import HeadFactory
from dynnet.files.bundles import read_bundle, write_bundle
from dynnet.files.packed import pack, unpack
from dynnet.gates.plan import GateConfig
from dynnet.model import DynamicModel
from dynnet.pruning.shape import UNCHANGED, Shape, Skipped, bring_into_shape, shape_of
from dynnet.wrapping import wrap

# What modules of one class may differ in, though their tensors do not, so that their answers differ.
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "eps", "negative_slope", "approximate")


def save(model: nn.Module, path: str | Path, create: Mapping[str, Any] | None = None, *, sparse: bool = False) -> None:
    """Save a model: weights, and all that is needed to build it again.

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
    create = dict(create or {"model_name": _timm_name(backbone), "num_classes": getattr(model, "num_classes", None)})
    fresh = _fresh(create)
    shape = UNCHANGED if fresh is None else shape_of(backbone, fresh)
    if fresh is not None and (other := _difference(backbone, fresh) or _misfit(backbone, fresh, shape)):
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
        "versions": {"timm": timm.__version__, "torch": torch.__version__.split("+")[0]},
    }
    if isinstance(model, DynamicModel):
        about |= {
            "kind": "model",
            "wrap": dataclasses.asdict(model.config),
            "thresholds": [to_json(t) for t in model.thresholds],
            "calibration": model.calibration,
            "regions": _regions(model),
        }
    tensors: Mapping[str, Tensor] = model.state_dict()
    if sparse:
        tensors, about["packed"] = pack(tensors)
    write_bundle(path, tensors, about)


def load(
    path: str | Path,
    backbone: nn.Module | None = None,
    heads: HeadFactory | None = None,
    confidence: Callable[[Tensor], Tensor] | None = None,
) -> DynamicModel:
    """Load a wrapped model that `save` saved, in eval mode; in the type of its weights, where the backbone is created.

    Args:
        path: the file.
        backbone: to be used instead of creating one; must be like the one that was saved, or, where timm makes it, like
            it was before it was pruned.
        heads, confidence: what `wrap` was given, if the model has some of the user's own.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    tensors, about = _read(path, "model")
    if about["wrap"]["heads"] == "custom" and heads is None:
        raise CheckpointError(f"{str(path)!r} has heads of its own making; pass the factory as heads=")
    if about["wrap"]["confidence"] == "custom" and confidence is None:
        raise CheckpointError(f"{str(path)!r} has a confidence measure of its own; pass it as confidence=")
    if backbone is not None:
        # On a copy without numbers: a backbone that does not fit is left untouched.
        _assembled(path, tensors, about, _twin(backbone), heads, confidence)
    model = _assembled(path, tensors, about, backbone, heads, confidence)
    if backbone is None:
        _retype(model, tensors)
    model.load_state_dict(tensors)
    model.thresholds = [float(t) for t in about["thresholds"]]
    model.calibration = about["calibration"]
    return model.eval()


def _assembled(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    backbone: nn.Module | None,
    heads: HeadFactory | None,
    confidence: Callable[[Tensor], Tensor] | None,
) -> DynamicModel:
    """The model of a file, ready for its weights; arguments and errors as for `load`."""
    backbone, settings = _built(path, about, backbone), about["wrap"]
    try:
        model = wrap(
            backbone,
            settings["exits"],
            gates=_gates(settings.get("gates")),
            heads=heads,
            head_share=settings["head_share"],
            confidence=confidence or settings["confidence"],
            input_size=tuple(settings["input_size"]),
        )
    except DynnetError as error:
        raise CheckpointError(
            f"{str(path)!r} was saved for {about['backbone']}, which does not fit the given backbone: {error}"
        ) from error
    try:
        if about.get("regions", _regions(model)) != _regions(model):
            raise CheckpointError(
                f"{str(path)!r} has gates for regions {about['regions']}, here they would be {_regions(model)}; it was "
                f"saved with {about['versions']}"
            )
        _as_saved(model, tensors, about, path)
        check_weights(model, tensors, path)
    except CheckpointError:
        model.unwrap()
        raise
    return model


def load_backbone(path: str | Path, backbone: nn.Module | None = None) -> nn.Module:
    """Load a plain model that `save` saved, pruned or not, in eval mode; types as for `load`.

    Args:
        path: the file.
        backbone: to be used instead of creating one, as in `load`.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    tensors, about = _read(path, "backbone")
    if backbone is not None:
        _prepared(path, tensors, about, _twin(backbone))
    built = _prepared(path, tensors, about, backbone)
    if backbone is None:
        _retype(built, tensors)
    built.load_state_dict(tensors)
    return built.eval()


def _retype(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's tensors the types of those that it will be given."""
    for name, own in model.state_dict(keep_vars=True).items():
        own.data = own.data.to(tensors[name].dtype)


def _prepared(
    path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], backbone: nn.Module | None
) -> nn.Module:
    """The plain model of a file, ready for its weights; arguments and errors as for `load_backbone`."""
    built = _built(path, about, backbone)
    _as_saved(built, tensors, about, path)
    check_weights(built, tensors, path)
    return built


def _read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, about = read_bundle(path)
    found = about.get("kind")
    if found != kind:
        remedy = {"model": "; dynnet.load reads it", "backbone": "; dynnet.load_backbone reads it"}.get(found or "", "")
        raise CheckpointError(f"{str(path)!r} holds a {found}, not a {kind}{remedy}")
    if "create" not in about:
        raise CheckpointError(f"{str(path)!r} does not say how to build its backbone; save it again with dynnet.save")
    if about.get("packed"):
        try:
            tensors = unpack(tensors, about["packed"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}; take another copy") from error
    return tensors, about


def _twin(model: nn.Module) -> nn.Module:
    """A copy without numbers."""
    with on_meta(model):
        return copy.deepcopy(model)


def _built(path: str | Path, about: Mapping[str, Any], given: nn.Module | None) -> nn.Module:
    """The backbone of a file, or the one that is given, in shape, with weights of no meaning."""
    backbone = given
    if backbone is not None and (told := not_plain(backbone)):
        raise CheckpointError(f"{str(path)!r} cannot be loaded into the given backbone: {told}")
    if backbone is None:
        try:
            if not timm.is_model(about["create"]["model_name"] or ""):
                raise ValueError("timm has no such model")
            backbone = timm.create_model(**about["create"])
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"timm cannot create the backbone of {str(path)!r}, {about['create']}: {error}; pass it as backbone="
            ) from error
    shape = about.get("shape")
    if not shape or shape == UNCHANGED:
        return backbone
    try:
        bring_into_shape(backbone, shape)
    except PruneError as error:
        raise CheckpointError(
            f"{str(path)!r} holds a pruned {about['backbone']}, and this backbone cannot be brought into its shape: "
            f"{error}; it was saved with {about['versions']}, this is timm {timm.__version__}"
        ) from error
    return backbone


def _as_saved(model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: str | Path) -> None:
    """Fold what was folded, and make int8 what was, in place."""
    try:
        if about.get("folded"):
            fold_again(model, about["folded"], tensors.keys())
        put_int8(model, dict.fromkeys(about.get("int8", ()), (0.0, 1.0)))
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(path)!r} was saved folded or in int8, which this {about['backbone']} cannot be: {error}; it was "
            f"saved with {about['versions']}"
        ) from error


def pruned_shape(backbone: nn.Module, create: Mapping[str, Any]) -> Shape:
    """How a backbone differs from the one that timm builds; not at all where timm cannot tell."""
    fresh = _fresh(create)
    return UNCHANGED if fresh is None else shape_of(backbone, fresh)


def _fresh(create: Mapping[str, Any]) -> nn.Module | None:
    """What timm builds, without numbers."""
    try:
        with torch.device("meta"):
            return timm.create_model(**create)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def _difference(model: nn.Module, fresh: nn.Module) -> str | None:
    """Where a model is of other parts than a fresh one, in words; None where it is only pruned, folded, in int8, or
    trained with other dropout."""
    mine, theirs = (dict(m.named_modules()) for m in (model, fresh))
    replaced = [name for name, module in mine.items() if isinstance(module, (Skipped, FoldedNorm, Int8Layer))]
    for name in [*theirs, *(name for name in mine if name not in theirs)]:
        if is_inside(name, replaced):
            continue
        kinds = [_kind(modules[name]) if name in modules else None for modules in (mine, theirs)]
        if kinds[0] is not kinds[1]:
            told = ["nothing" if kind is None else f"a {kind.__name__}" for kind in kinds]
            return f"{name!r} is {told[0]}, there {told[1]}"
        for key in _SETTINGS:
            values = [getattr(modules[name], key, None) for modules in (mine, theirs)]
            if values[0] != values[1]:
                return f"{name!r} has {key}={values[0]}, there {values[1]}"
    return None


def _misfit(model: nn.Module, fresh: nn.Module, shape: Shape) -> str | None:
    """Why a fresh model cannot be brought into the shape of another, in words; None where it can. It is not fresh
    afterwards."""
    try:
        bring_into_shape(fresh, shape)
    except PruneError as error:
        return str(error)
    mine, theirs = model.state_dict(), fresh.state_dict()
    for name in (name for name in mine if name in theirs):
        if mine[name].shape != theirs[name].shape:
            return f"{name!r} has shape {tuple(mine[name].shape)}, there {tuple(theirs[name].shape)}"
    return None


def _timm_name(backbone: nn.Module) -> str | None:
    """With the tag of its pretrained weights, on which input size and normalisation depend, where timm knows it."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    name, tag = config.get("architecture"), config.get("tag")
    tagged = f"{name}.{tag}"
    return tagged if tag and timm.is_model_pretrained(tagged) else name


def _kind(module: nn.Module) -> type:
    """Its class; nothing happens in eval mode in any form of dropout."""
    return nn.Identity if isinstance(module, (nn.modules.dropout._DropoutNd, DropPath)) else type(module)


def _regions(model: DynamicModel) -> list[list[Any]]:
    """What each gate network decides, as JSON: equal shapes do not mean that they switch the same layers."""
    return [] if model.gates is None else [[r.layer, list(r.groups)] for r in model.gates.plan.regions]


def _gates(settings: Mapping[str, Any] | None) -> GateConfig | None:
    return None if settings is None else GateConfig(settings["unit"], settings["blocks"], tuple(settings["exclude"]))


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Strict loading; raises as `check_weights`, and leaves the model untouched then."""
    check_weights(model, tensors, source)
    model.load_state_dict(dict(tensors))


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Have tensors the names and shapes that a model has?

    Raises:
        CheckpointError: a name that is missing or unknown, or a shape that differs.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unknown or shapes:
        problems = [
            f"lacks {len(missing)} tensors (first {missing[0]!r})" if missing else "",
            f"has {len(unknown)} unknown tensors (first {unknown[0]!r})" if unknown else "",
            f"{shapes[0]!r} has shape {tuple(tensors[shapes[0]].shape)}, the model's is {tuple(own[shapes[0]].shape)}"
            if shapes
            else "",
        ]
        raise CheckpointError(f"{str(source)!r} is of another model: {'; '.join(p for p in problems if p)}")
