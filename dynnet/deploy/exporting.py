"""`export`: a model into a folder of stages that an engine runs."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import nn

from dynnet.backbone.host import preparation_of
from dynnet.backbone.input_size import input_size_of
from dynnet.backbone.names import title
from dynnet.backbone.twin import copy_of
from dynnet.certificate import void_certificate
from dynnet.deploy import engines
from dynnet.deploy.checks import checked_stage
from dynnet.deploy.folding import fold
from dynnet.deploy.manifest import Manifest, Part, digest_of_file
from dynnet.deploy.one_width import at_widths
from dynnet.deploy.quantizing import Calibrating, Images, in_int8, quantize_
from dynnet.deploy.ways import Way, in_widths
from dynnet.deploy.whole import Nowhere, fits_a_graph
from dynnet.errors import ExportError
from dynnet.exits.confidence import Instant
from dynnet.exits.threshold import to_json
from dynnet.gates.routers import Routers
from dynnet.model import DynamicModel
from dynnet.wrapping import wrap


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    engine: str = "onnxruntime",
    exits: Literal["running", "all"] = "running",
    input_size: tuple[int, int, int] | None = None,
    int8: bool = False,
    loader: Images | None = None,
) -> Manifest:
    """Write a model as stages that an engine runs, each up to the next decision: what a sample skips is not run.

    >>> import timm, torch, tempfile, dynnet
    >>> from dynnet.deploy import Runner
    >>> model = dynnet.wrap(timm.create_model("cifar_resnet20"), exits=["layer1"]).eval()
    >>> model.thresholds, images = [0.11], torch.randn(4, 3, 32, 32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manifest = export(model, f"{folder}/stages")
    ...     prediction = Runner(f"{folder}/stages").predict(images.numpy())
    >>> prediction.exit.tolist() == model.predict(images).exit.tolist()
    True

    Args:
        model: a wrapped model in single precision, or any plain one, which gives one stage. Channels that gates close
            are zero in an engine, but computed, and billed: a warning says so. A measure of confidence that is Python
            code, which no graph can hold, is left to `Runner(folder, confidence=...)`.
        folder: to be made, with a stage a file, manifest.json and a README.md. It is there when it is whole.
        engine: "onnxruntime", "openvino" or "torch". On a GPU stages for "torch" are compiled when they are checked,
            which takes from seconds to minutes.
        exits: "running" leaves out exits that are switched off; "all" gives them stages too, so that they can be
            switched on afterwards. Thresholds of the others can always be changed.
        input_size: (C, H, W) of a plain model's images; by default what it was made for.
        int8: put the stages into int8, and fit the thresholds again, so that at every exit the same share of the
            loader's images leaves as before. A certificate does not outlast that. Stages are checked in float first.
        loader: for int8: batches of (images (B, C, H, W), ...), or of images alone, prepared as the model expects them,
            in any order; not those that it will be tested on. It is gone through twice.

    Returns:
        What the folder says, with the largest differences between the engine's answers and PyTorch's.

    Raises:
        ExportError: a folder that is there already, a model that cannot be exported, an engine that is not installed,
            or that answers otherwise than PyTorch does; for int8 no loader, or answers that have little to do with
            those in float. Nothing is left behind.
        DataError: a loader without images.
    """
    folder = Path(folder)
    chosen = engines.engine(engine)
    if folder.exists():
        raise ExportError(f"{str(folder)!r} is there already; remove it, or choose another folder")
    whole = _ready(model, exits, input_size)
    if int8 and isinstance(whole.measure, Nowhere):
        raise ExportError("thresholds are fitted again in int8, by a confidence that is Python code; export in float")
    calibrating = Calibrating(whole, loader) if int8 else None
    ways = list(in_widths(whole))
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        part.mkdir(parents=True)
        files, differences = [], []
        for way in ways:
            files.append(part / f"{way.name}{chosen.SUFFIX}")
            chosen.lower(way.stage, way.fed, files[-1])
            differences.append(checked_stage(chosen, files[-1], way.stage, way.fed, way.made))
        in_float = [float(t) for t in (model if isinstance(model, DynamicModel) else whole).thresholds]
        found = quantize_(chosen, files, ways, in_float, calibrating) if calibrating else None
        manifest = _manifest(model, whole, ways, files, differences, engine)
        if void := void_certificate(model) if isinstance(model, DynamicModel) else None:
            warnings.warn(f"the model's certificate is void: {void}; call dynnet.calibrate again", stacklevel=3)
            manifest = manifest.voided(void)
        if found:
            manifest = in_int8(manifest, *found)
        manifest.write(part)
        (part / "README.md").write_text(_readme(manifest))
        part.replace(folder)
    except OSError as error:
        raise ExportError(f"cannot write {str(folder)!r}: {error.strerror or error}; make room for it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _ready(model: nn.Module, exits: str, size: tuple[int, int, int] | None) -> DynamicModel:
    """A copy to be exported: wrapped, in eval mode, with all exits on that get a stage; of one width, folded."""
    if exits not in ("running", "all"):
        raise ExportError(f"exits={exits!r}: choose from running, all")
    weight = next(model.parameters(), torch.zeros(()))
    if weight.dtype != torch.float32:
        raise ExportError(f"the model is in {weight.dtype}; export it in single precision, with .float()")
    if isinstance(model, DynamicModel):
        copy = copy_of(model)
        if isinstance(model.gates, Routers) and model.gates.chosen is not None:
            copy = at_widths(model, model.gates.chosen)
        if exits == "all":
            copy.thresholds = [0.0 if t == float("inf") else t for t in model.thresholds]
        if copy.gates is not None and not isinstance(copy.gates, Routers):
            warnings.warn(
                "gates close other channels for every image, which no graph can skip: in an engine closed channels are "
                "zero, but cost what open ones do",
                stacklevel=3,
            )
        if not fits_a_graph(copy.measure, copy.num_classes):
            if not isinstance(copy.measure, Instant):
                raise ExportError(
                    f"the measure {copy.measure.name!r} remembers what earlier exits said, in Python that no graph can "
                    f"hold; write it with operators of torch"
                )
            copy.measure = Nowhere()
    else:
        copy = wrap(copy_of(model), [], input_size=size or input_size_of(model))
    return copy.eval() if isinstance(copy.gates, Routers) else fold(copy.eval())


def _manifest(
    model: nn.Module,
    whole: DynamicModel,
    ways: Sequence[Way],
    files: Sequence[Path],
    differences: Sequence[dict[str, float]],
    engine: str,
) -> Manifest:
    given = model if isinstance(model, DynamicModel) else whole
    parts = tuple(
        Part(
            file.name, digest_of_file(file), s.takes, s.gives, s.exit, way.macs, way.adds, way.width, s.answers, s.route
        )
        for way, file in zip(ways, files, strict=True)
        for s in [way.stage]
    )
    versions = {"dynnet": _version("dynnet"), "timm": timm.__version__, "torch": torch.__version__.split("+")[0]}
    return Manifest(
        format=2,
        engine=engine,
        model=title(whole.backbone),
        exits=whole.exits,
        thresholds=tuple(to_json(t) for t in given.thresholds),
        confidence=given.measure.name,
        on_host=isinstance(whole.measure, Nowhere),
        stages=parts,
        dense_macs=whole.ledger().dense,
        input_size=whole.input_size,
        dtype="float32",
        classes=whole.num_classes,
        preparation=preparation_of(whole.backbone),
        calibration=given.calibration,
        versions={**versions, **engines.engine(engine).versions()},
        differences=tuple(differences),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _readme(manifest: Manifest) -> str:
    """How to run it."""
    channels, height, width = manifest.input_size
    known = {key: manifest.preparation[key] for key in ("mean", "std") if key in manifest.preparation}
    prepared = "".join(f"    {key} = {value}\n" for key, value in known.items())
    if prepared:
        prepared = f"\nImages in [0, 1] are prepared as (image - mean) / std a channel, with\n\n{prepared}"
    lines = [
        f"- `{part.file}`: {_end(part, manifest)}, {part.macs / 1e6:.2f} MMAC a sample that answers there"
        for part in manifest.stages
    ]
    given = ", confidence=measure)  # (b, K) logits to (b,), which no graph could hold" if manifest.on_host else ")"
    in_int8 = "Weights and features are in int8. " if manifest.precision == "int8" else ""
    return f"""# {manifest.model}, in stages

{chr(10).join(lines)}

{in_int8}Run it with {_needed(manifest.engine)}:

    from dynnet.deploy import Runner

    runner = Runner("this folder"{given}
    prediction = runner.predict(images)  # float32 (B, {channels}, {height}, {width})
    prediction.logits, prediction.exit, prediction.confidence, prediction.macs
{prepared}
`runner.thresholds` can be changed: a sample leaves at the first exit whose confidence ({manifest.confidence}) reaches
its threshold. `manifest.json` says everything else.
"""


def _needed(engine: str) -> str:
    return "torch; timm is not needed" if engine == "torch" else f"numpy and {engine}; neither torch nor timm is needed"


def _end(part: Part, manifest: Manifest) -> str:
    return "the end" if part.exit == len(manifest.exits) else f"up to exit {manifest.exits[part.exit]!r}"
