"""What the command can do. Each verb prints a table for people, or with --json what a machine reads.

B images, K classes, E exits
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynnet.command.per_input import find_table, summed_up
from dynnet.command.subjects import Subject, find
from dynnet.command.tables import table
from dynnet.errors import InputError
from dynnet.serving.images import prepared


def list_models(filter: str = "*", json: bool = False) -> None:
    """Models of the zoo.

    Args:
        filter: with * for any letters.
        json: for machines.
    """
    import dynnet
    from dynnet import zoo

    found = {name: zoo.results(name) for name in dynnet.list_models(filter)}
    if json:
        _tell(found)
        return
    rows = [
        [
            name,
            said["dataset"],
            f"{said['accuracy']:.2%}",
            f"{said['mean_macs'] / said['dense_macs']:.0%} of {said['dense_macs'] / 1e6:.1f} M",
        ]
        for name, said in found.items()
    ]
    print(table(["model", "data", "accuracy", "mean MACs"], rows))


def info(model: str, json: bool = False) -> None:
    """What a model is: its exits, prices, thresholds, and what was promised of them.

    Args:
        model: of the zoo, a file, an exported folder, or timm's name, of which is told where exits may stand.
        json: for machines.
    """
    said = _about(find(model))
    if json:
        _tell(said)
        return
    for key, value in said.items():
        if key != "exits":
            print(f"{key.replace('_', ' ')}: {value}")
    if said["exits"]:
        head = list(said["exits"][0])
        print(
            table([key.replace("_", " ") for key in head], [[str(row[key]) for key in head] for row in said["exits"]])
        )


def predict(model: str, images: list[Path], threads: int | None = None, json: bool = False) -> None:
    """Answer image files: class, confidence, the exit that was taken, and what it cost.

    Args:
        model: of the zoo, a file, or an exported folder, which runs in its engine.
        images: files, each answered alone.
        threads: of the engine, or of PyTorch.
        json: for machines.
    """
    subject = find(model, threads)
    ask, size, preparation, exits = _answering(subject, threads)
    names = preparation.get("label_names")
    found: list[dict[str, Any]] = []
    ask(prepared(images[0], size, preparation)[None])  # the first call makes ready what others find
    for path in images:
        pixels = prepared(path, size, preparation)[None]
        began = time.perf_counter()
        answer = ask(pixels)
        took = (time.perf_counter() - began) * 1e3
        number, exit = int(np.asarray(answer.logits)[0].argmax()), int(answer.exit[0])
        found.append(
            {
                "file": str(path),
                "class": str(names[number]) if names else number,
                "confidence": round(float(answer.confidence[0]), 4),
                "exit": exits[exit] if exit < len(exits) else "end",
                "macs": int(answer.macs[0]),
                "ms": round(took, 3),
            }
        )
    if json:
        _tell(found)
        return
    rows = [
        [
            str(r["file"]),
            str(r["class"]),
            f"{r['confidence']:.3f}",
            str(r["exit"]),
            f"{r['macs'] / 1e6:.2f} M",
            f"{r['ms']:.2f}",
        ]
        for r in found
    ]
    print(table(["file", "class", "confidence", "exit", "MACs", "ms"], rows))


def export(model: str, folder: Path, engine: str = "onnxruntime", pretrained: bool = False) -> None:
    """Write a model as stages that an engine runs.

    Args:
        model: of the zoo, a file, or timm's name, which gives one stage.
        folder: to be made.
        engine: onnxruntime, openvino or torch.
        pretrained: of a model of timm's, with its weights.
    """
    import dynnet

    subject = find(model, pretrained=pretrained)
    if subject.kind == "exported":
        raise InputError(f"{model!r} is exported already; name what it was made from")
    manifest = dynnet.export(subject.model, folder, engine=engine)
    worst = max((max(found.values()) for found in manifest.differences), default=0.0)
    print(f"{folder}: {len(manifest.stages)} stages for {engine}, which differ from PyTorch by {worst:.1g} at most")
    print(f"dynnet predict {folder} IMAGES... answers with it")


def bench(
    model: str,
    images: Sequence[Path] = (),
    engine: str | None = None,
    batch: int = 1,
    calls: int = 200,
    threads: int | None = None,
) -> None:
    """Time a model against its bare backbone, in turns, on image files or on noise.

    On noise samples leave elsewhere than on images: what each exit takes is right, the mean is not that of your data.

    Args:
        model: of the zoo, or a file.
        images: files, taken again and again; none for noise.
        engine: in which both run; by default PyTorch.
        batch: images of a call.
        calls: timed calls.
        threads: by default as many as the model's layers can feed.
    """
    import torch

    import dynnet
    from dynnet.backbone.host import preparation_of
    from dynnet.evaluation.threads import fit_threads
    from dynnet.model import DynamicModel

    subject = find(model)
    if not isinstance(subject.model, DynamicModel):
        raise InputError(f"{model!r} has no exits, and nothing to be compared with; name a model of the zoo, or a file")
    size = subject.model.input_size
    told = fit_threads(subject.model, size, batch) if threads is None else f"{threads} thread{'s' * (threads != 1)}"
    if threads is not None:
        torch.set_num_threads(threads)
    if images:
        preparation = preparation_of(subject.model)
        given = torch.from_numpy(np.stack([prepared(path, size, preparation) for path in images]))
        pixels = given.repeat(-(-batch // len(given)), 1, 1, 1)
    else:
        pixels = torch.randn(max(64, batch), *size, generator=torch.Generator().manual_seed(0))
    ready = subject.model if engine is not None else dynnet.fold(subject.model)
    print(f"{told}; {f'{len(images)} images' if images else 'noise, on which samples leave elsewhere than on images'}")
    print(dynnet.latency(ready, pixels, batch_size=batch, calls=calls, engine=engine))


def report(table_or_run: Path, json: bool = False) -> None:
    """Sum up a per-input table.

    Args:
        table_or_run: a table.csv, or a run that has a report.
        json: for machines.
    """
    said = summed_up(find_table(table_or_run))
    if json:
        _tell(said)
        return
    dense = said.get("dense_macs")
    of_dense = "" if dense is None else f", {said['mean_macs'] / dense:.1%} of the bare backbone's {dense / 1e6:.2f} M"
    print(f"{said['inputs']:,} inputs, {said['accuracy']:.2%} right, {said['mean_macs'] / 1e6:.2f} MMAC{of_dense}")
    for name, unit, scale in (("macs", "MMAC", 1e6), ("latency_ms", "ms", 1.0), ("dense_latency_ms", "ms", 1.0)):
        if name in said:
            quantiles = ", ".join(f"{key} {value / scale:.2f}" for key, value in said[name].items())
            print(f"{name.replace('_', ' ')}: {quantiles} {unit}")
    rows = [
        [
            str(row["exit"]),
            f"{row['share']:.1%}",
            _percent(row["right"]),
            _percent(row["right_of_all"]),
            "" if row["mean_macs"] is None else f"{row['mean_macs'] / 1e6:.2f} M",
        ]
        for row in said["exits"]
    ]
    print(table(["exit", "leave here", "right", "right of all", "MACs"], rows))
    if said["points"]:
        points = [[f"{p['mean_macs'] / 1e6:.2f} M", f"{p['accuracy']:.2%}"] for p in said["points"]]
        print(table(["mean MACs", "accuracy"], points))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _tell(found: Any) -> None:
    print(json.dumps(found, indent=1, default=str))


def _about(subject: Subject) -> dict[str, Any]:
    if subject.kind == "exported":
        return _of_exported(subject.model)
    from dynnet.model import DynamicModel

    return _of_wrapped(subject) if isinstance(subject.model, DynamicModel) else _of_plain(subject)


def _of_wrapped(subject: Subject) -> dict[str, Any]:
    from dynnet.backbone.host import preparation_of
    from dynnet.backbone.names import title

    model = subject.model
    ledger, shares = model.ledger(), [boundary.macs_share for boundary in model.boundaries]
    exits = [
        {"exit": name, "at": f"{share:.1%}", "head": f"{head / ledger.dense:.2%}", "threshold": f"{threshold:.4g}"}
        for name, share, head, threshold in zip(model.exits, shares, ledger.heads, model.thresholds, strict=True)
    ]
    return {
        "backbone": title(model.backbone),
        "input_size": tuple(model.input_size),
        "classes": model.num_classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": ledger.dense,
        "flops": 2 * ledger.dense,
        "confidence": model.measure.name,
        "gates": "none" if model.gates is None else f"on {model.gates.plan.macs_share:.0%} of the MACs",
        "calibration": _promise(model.calibration),
        "preparation": {k: v for k, v in preparation_of(model).items() if k != "label_names"},
        "exits": exits,
    }


def _of_plain(subject: Subject) -> dict[str, Any]:
    from dynnet.backbone.input_size import input_size_of
    from dynnet.backbone.names import title
    from dynnet.exits.boundaries import Places

    places = Places(subject.model, input_size_of(subject.model))
    return {
        "backbone": title(subject.model),
        "input_size": tuple(places.input_size),
        "classes": places.num_classes,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "macs": places.trace.macs,
        "flops": 2 * places.trace.macs,
        "exits": [{"may_stand_at": b.name, "at": f"{b.macs_share:.1%}"} for b in places.candidates],
    }


def _of_exported(runner: Any) -> dict[str, Any]:
    said = runner.manifest
    stages = [
        {
            "stage": part.file,
            "exit": said.exits[part.exit] if part.exit < len(said.exits) else "end",
            "macs": part.macs,
            "threshold": f"{runner.thresholds[part.exit]:.4g}" if part.exit < len(said.exits) else "",
        }
        for part in said.stages
    ]
    return {
        "backbone": said.model,
        "engine": said.engine,
        "precision": said.precision,
        "input_size": said.input_size,
        "classes": said.classes,
        "macs": said.dense_macs,
        "flops": 2 * said.dense_macs,
        "confidence": said.confidence,
        "calibration": runner.void or _promise(said.calibration),
        "exits": stages,
    }


def _promise(said: Any) -> str:
    """What thresholds were fitted for, with the condition under which it holds."""
    if not said:
        return "thresholds were set by hand"
    fitted = f"fitted for {said['goal']}={said['value']:g} on {said['samples']:,} samples"
    certificate = said.get("certificate")
    if certificate is None:
        return f"{fitted}, an estimate"
    return f"{fitted}, certified: " + ", ".join(f"{key} {value}" for key, value in certificate.items())


def _answering(subject: Subject, threads: int | None) -> tuple[Callable[[np.ndarray], Any], Any, Any, tuple[str, ...]]:
    """What answers images, their size and preparation, and the names of exits."""
    if subject.kind == "exported":
        runner = subject.model
        return runner.predict, runner.manifest.input_size, runner.manifest.preparation, runner.exits
    import torch

    import dynnet
    from dynnet.backbone.host import preparation_of
    from dynnet.backbone.input_size import input_size_of
    from dynnet.evaluation.threads import fit_threads
    from dynnet.model import DynamicModel

    if subject.kind == "timm":
        raise InputError(
            f"{subject.name!r} is not trained here; name a model of the zoo, a file, or an exported folder"
        )
    model = subject.model
    if not isinstance(model, DynamicModel):
        model = dynnet.wrap(model, [], input_size=tuple(input_size_of(model)))
    if threads is None:
        fit_threads(model, model.input_size, 1)
    else:
        torch.set_num_threads(threads)
    ready = dynnet.fold(model)
    return (lambda x: ready.predict(torch.from_numpy(x))), model.input_size, preparation_of(model), model.exits
