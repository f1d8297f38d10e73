"""Export a model, verify what was exported, and time it in its engine, in one command.

    python -m eval.deploy --run runs/digits
    python -m eval.deploy --zoo cifar10-resnet56 --data path/to/cifar10 --out resnet56-stages --threads 1
    python -m eval.deploy --model resnet50 --batch 1 16

Of a run or a model of the zoo: with its thresholds, on its test images, drawn at random for every batch. Of a model of
timm's, which is not trained: on noise, with exits that nobody takes, and where half or all of a batch leaves.

Exits of a model of timm's are spread over its MACs, or with --by time over the time that the engine takes.

Verified: every stage on noise, as it is exported; then whole images against the eager model: the same exit and class
for all that are not within 1e-5 of a threshold. Timed: the dynamic model against its bare backbone, both exported and
in the same engine, in turns on the same images; then against itself in eager PyTorch. Time saved is of a typical call:
1 - the median ratio of paired times; at batch size 1 the medians by exit taken, weighed by how many took it. For a
model of timm's, what stands behind an exit is also exported and timed alone: nobody could save more by leaving there.
Memory is that of a process that runs nothing but the stages, at its peak.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from dynnet import DynamicModel, calibrate, latency
from dynnet.backbone.modes import device_of
from dynnet.deploy import engines
from dynnet.deploy.manifest import Manifest
from dynnet.deploy.time_shares import exits_by_time
from dynnet.errors import InputError
from dynnet.evaluation.allocator import keep_freed_memory
from dynnet.evaluation.threads import fit_threads
from dynnet.learning.data import Data
from eval.agreement import agreement
from eval.bare_parts import rests
from eval.exported import Exported
from eval.memory import peak_memory
from eval.programs import errors_told, timm_model, write_json
from eval.runs import open_run, open_zoo, test_images
from eval.savings import in_words, percentiles, savings
from eval.scenarios import half_at_each, random_images, ready, scenarios, untrained

_VERIFIED = 64  # images of noise, for a model of timm's


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        name: for people.
        model: in eval mode, on the CPU or where it runs eagerly.
        data: of its test images; None for a model that is not trained, and gets noise.
        pictures: (M, C, H, W) of the test images, to be timed.
    """

    name: str
    model: DynamicModel
    data: Data | None = None
    pictures: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """How it is timed."""

    threads: int | None
    batch: Sequence[int]
    calls: int
    eager: bool


def main(
    run: Path | None = None,
    zoo: str | None = None,
    model: str | None = None,
    exits: int = 2,
    by: Literal["macs", "time"] = "macs",
    engine: str = "onnxruntime",
    out: Path | None = None,
    threads: int | None = None,
    batch: Sequence[int] = (1, 64),
    samples: int = 700,
    calls: int = 30,
    data: str | None = None,
    fit: float | None = None,
    eager: bool = True,
    device: str = "cpu",
    json: Path | None = None,
) -> None:
    """Export, verify and time.

    Args:
        run: folder of a finished run.
        zoo: in its place, name of a model of the zoo.
        model: or timm's name of a model, with random weights and images.
        exits: number of exits of `model`,
        by: spread over its MACs, or over its time in the engine.
        engine: in which the stages run.
        out: folder to be made for them; by default they are not kept.
        threads: of the engine and of PyTorch; by default as many as the model's layers can feed, for each batch size.
        batch: batch sizes, each timed apart.
        samples: test images to time one at a time; p99 needs 662.
        calls: timed calls at other batch sizes; of `model` four times as many at batch size 1.
        data: folder of the dataset, where it is not the recipe's.
        fit: first fit the thresholds, on the calibration split, for this share of the bare backbone's mean time in the
            engine, at the first of the batch sizes, as `dynnet.calibrate(latency=)` does.
        eager: also time against the dynamic model in eager PyTorch.
        device: on which that runs.
        json: also write the figures to this file.
    """
    keep_freed_memory()
    with errors_told():
        if (run is not None) + (zoo is not None) + (model is not None) != 1:
            raise InputError(
                "give one of --run, a finished run, --zoo, a name of the zoo, and --model, a name of timm's"
            )
        places: int | list[str] = exits
        if model is not None and by == "time":
            places = list(exits_by_time(timm_model(model), exits, engine=engine))
            print(f"exits by time: {', '.join(places)}", flush=True)
        subject = _subject(run, zoo, model, places, data, device, max(samples, *batch))
        settings = Settings(threads, batch, calls, eager)
        if fit is not None:
            _fit(subject, fit, engine, settings)
        with tempfile.TemporaryDirectory() as folder:
            exported = Exported(subject.model, engine, folder)
            found = _deployed(subject, exported, out or Path(folder) / "stages", settings)
        if json is not None:
            write_json(found, json)


def _subject(
    run: Path | None,
    zoo: str | None,
    model: str | None,
    exits: int | list[str],
    data: str | None,
    device: str,
    samples: int,
) -> Subject:
    if model is not None:
        return Subject(model, untrained(model, exits).to(device))
    if run is not None:
        opened = open_run(run, data, device)
        name, found, loaded = str(run), opened.model, opened.data
    else:
        name = str(zoo)
        found, loaded = open_zoo(name, data)
    return Subject(name, found.to(device), loaded, test_images(loaded, samples)[1])


def _fit(subject: Subject, share: float, engine: str, settings: Settings) -> None:
    if subject.data is None:
        raise InputError("--fit wants a trained model and its calibration split; give --run or --zoo")
    _use_threads(subject.model, settings, settings.batch[0])
    loader = subject.data.loader("calibration", 256)
    print(calibrate(subject.model, loader, latency=share, engine=engine, batch_size=settings.batch[0]), flush=True)


def _use_threads(model: DynamicModel, settings: Settings, size: int) -> str:
    """As many as were asked for, or as the model's layers can feed; in words."""
    if settings.threads is None:
        return fit_threads(model, model.input_size, size)
    torch.set_num_threads(settings.threads)
    return f"{settings.threads} as --threads says"


def _deployed(subject: Subject, exported: Exported, out: Path, settings: Settings) -> dict[str, Any]:
    """All figures, told as they come."""
    model = subject.model
    manifest = exported.take(out)
    print(_stages_told(subject, manifest, out), flush=True)
    _use_threads(model, settings, 256)
    if subject.data is None:
        noise = random_images(model, _VERIFIED)
        before, model.thresholds = model.thresholds, half_at_each(model, noise)
        agreed = agreement(model, exported.dynamic(), noise.split(16))
        model.thresholds = before
    else:
        agreed = agreement(model, exported.dynamic(), _test_batches(subject.data))
    print(agreed, flush=True)
    return {
        "model": subject.name,
        "engine": dict(engines.engine(manifest.engine).versions()),
        "thresholds": list(manifest.thresholds),
        "stages": _stages(manifest, out),
        "agreement": agreed.summary(),
        "timed": [row for size in settings.batch for row in _timed(subject, exported, size, settings)],
    }


def _stages(manifest: Manifest, folder: Path) -> list[dict[str, Any]]:
    """Of each stage what it costs, weighs, and differs by."""
    return [
        {
            "file": part.file,
            "exit": _exit_name(manifest.exits, part.exit),
            "macs": part.macs,
            "size_bytes": (folder / part.file).stat().st_size,
            "differences": dict(differences),
        }
        for part, differences in zip(manifest.stages, manifest.differences, strict=True)
    ]


def _stages_told(subject: Subject, manifest: Manifest, folder: Path) -> str:
    lines = [f"{subject.name}, exported for {manifest.engine}:"]
    for stage in _stages(manifest, folder):
        worst = max(stage["differences"], key=stage["differences"].get)
        lines.append(
            f"  {stage['file']}: up to {stage['exit']}, {stage['macs'] / 1e6:.2f} MMAC a sample that answers there, "
            f"{stage['size_bytes'] / 1e6:.2f} MB; differs by {stage['differences'][worst]:.2g} at most, in {worst}"
        )
    off = [name for exit, name in enumerate(manifest.exits) if exit not in {part.exit for part in manifest.stages}]
    lines += [f"  switched off, and without a stage: {', '.join(off)}"] if off else []
    return "\n".join([*lines, f"  bare backbone: {manifest.dense_macs / 1e6:.2f} MMAC"])


def _test_batches(data: Data) -> Iterator[Tensor]:
    for images, *_ in tqdm(data.loader("test", 256), desc="answers compared", leave=False, disable=None):
        yield images


def _timed(subject: Subject, exported: Exported, size: int, settings: Settings) -> list[dict[str, Any]]:
    """Rows of figures at a batch size: one, or one a scenario."""
    model = subject.model
    print(f"batch {size}: {_use_threads(model, settings, size)}", flush=True)
    if subject.pictures is not None:
        calls = None if size == 1 else settings.calls  # each image once
        return [_row(subject, exported, subject.pictures, size, calls, settings.eager)]
    images, found = random_images(model, size), []
    before = model.thresholds
    some, calls = (images, 4 * settings.calls) if size == 1 else (images[:size], settings.calls)
    behind = [share for whole, half in rests(model, exported.dense(), size, calls) for share in (whole - half, whole)]
    for (scenario, thresholds), most in zip(scenarios(model, images).items(), [0.0, *behind], strict=True):
        model.thresholds = thresholds
        row = _row(subject, exported, some, size, calls, settings.eager, scenario)
        found.append({"scenario": scenario, "most_time_saved": most, **row})
        if most:
            print(f"  what would have run behind it, exported alone: {most:.1%} of the time", flush=True)
    model.thresholds = before
    return found


def _row(
    subject: Subject, exported: Exported, images: Tensor, size: int, calls: int | None, eager: bool, scenario: str = ""
) -> dict[str, Any]:
    model, runner = subject.model, exported.dynamic()
    timed = latency(runner, images, against=exported.dense(), batch_size=size, calls=calls)
    ledger = model.ledger()
    saved = savings(timed, ledger.bill(model.running).tolist(), ledger.dense)
    bare, cut = (peak_memory(folder, torch.get_num_threads(), size) for folder in exported.folders())
    row = {**saved, **timed.summary(), "peak_mib": {"dense": bare, "dynamic": cut}}
    line = f"{', '.join(filter(None, [f'batch {size}', scenario]))}: {percentiles(timed, 'dense')}; {in_words(saved)}"
    line += f"; {cut:.0f} MiB ({bare:.0f})"
    if eager:
        # Apart, as PyTorch's threads spin for a while when they have worked, and would disturb the engine's.
        slow = ready(model, channels_last=subject.data is None, device=str(device_of(model)))
        beside = latency(runner, images, against=slow, batch_size=size, calls=calls)
        row["eager"] = {"p50_ms": beside.percentile(50)[0], "speedup": beside.speedup}
        line += f"; {beside.speedup:.2f} times as fast as eagerly"
    print(line, flush=True)
    return row


def _exit_name(exits: Sequence[str], number: int) -> str:
    return f"exit {exits[number]!r}" if number < len(exits) else "the end"


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"batch"})
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes, each timed apart")
    main(**vars(parser.parse_args()))
