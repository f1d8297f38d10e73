"""Answer a folder of images by an exported model, in parallel, into Parquet files: a row an image.

    python -m dynnet.serving.batch path/to/images stages --out answers --processes 4

The work goes in parts, by Ray Data; each writes a file of its own, whole or not at all. Started again, the job does
what is missing. `pyarrow.parquet.read_table("answers")` reads all of it. Columns: file (below the folder), prediction
(its number), class, exit (its number; the last is the model's own head), confidence, macs, error (words, where it is no
image).
Wants `pip install dynnet[serve]`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynnet.deploy import Runner
from dynnet.deploy.manifest import NAME as MANIFEST
from dynnet.deploy.manifest import digest_of_file
from dynnet.errors import CheckpointError, DataError, DynnetError
from dynnet.learning.pictures import printable
from dynnet.serving.arguments import count
from dynnet.serving.door import missing
from dynnet.serving.images import pictures_in, prepared

_JOB = "_job.json"  # readers of Parquet folders pass over such names


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job to its end; the exit status is 2 where something is wrong."""
    parser = argparse.ArgumentParser(
        "python -m dynnet.serving.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder, looked through to the bottom")
    parser.add_argument("model", type=Path, help="folder that `dynnet export` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the answers; made, or gone on with")
    parser.add_argument("--part", type=count, default=1000, help="images of a file (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=32, help="images of a call (default: %(default)s)")
    parser.add_argument("--processes", type=count, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=count, default=1, help="of the engine in each (default: %(default)s)")
    given = vars(parser.parse_args(argv))
    try:
        done = answer_folder(**given)
    except DynnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130  # as shells do
    print(f"{given['out']}: {done:,} images are answered")
    return 0


def answer_folder(
    images: Path, model: Path, out: Path, part: int = 1000, batch: int = 32, processes: int = 1, threads: int = 1
) -> int:
    """Answer all images that are not answered yet; gives how many there are.

    Raises:
        DataError: no images.
        ExportError: no exported model, or a damaged one.
        InputError: Ray is not installed.
        CheckpointError: what is there already is of another model or of other images.
    """
    try:
        import ray
    except ImportError as error:
        raise missing(error) from None
    names = [str(path.relative_to(images)) for path in pictures_in(images)]
    Runner(model, threads)  # what is wrong is told here, and not by every process
    _begin(out, {"model": digest_of_file(model / MANIFEST), "images": _digest_of(names), "part": part})
    parts = [names[first : first + part] for first in range(0, len(names), part)]
    todo = [(number, inside) for number, inside in enumerate(parts) if not _file(out, number).is_file()]
    print(f"{len(names):,} images in {len(parts)} parts, of which {len(parts) - len(todo)} are there", flush=True)
    if todo:
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of it
            # One more than actors hold: what hands them their work needs one, too.
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=processes + 1)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False  # parts are told as they are done
        items = [{"number": number, "names": inside} for number, inside in todo]
        work = ray.data.from_items(items, override_num_blocks=len(items))
        where = {"images": images.resolve(), "model": model.resolve(), "out": out.resolve()}
        answered = work.map_batches(
            Answering, batch_size=1, compute=ray.data.ActorPoolStrategy(size=processes),
            fn_constructor_kwargs={**where, "batch": batch, "threads": threads},
        )  # fmt: skip
        for row in answered.iter_rows():
            print(f"part {int(row['number'])}: {int(row['answered'])} images", flush=True)
    return len(names)


class Answering:
    """A process that answers parts."""

    def __init__(self, images: Path, model: Path, out: Path, batch: int, threads: int) -> None:
        self._images, self._out, self._batch = images, out, batch
        self._runner = Runner(model, threads)

    def __call__(self, work: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number, names in zip(work["number"].tolist(), work["names"], strict=True):
            _write(_file(self._out, number), [row for some in _batches(names, self._batch) for row in self._rows(some)])
        return {"number": work["number"], "answered": np.array([len(names) for names in work["names"]])}

    def _rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        said = self._runner.manifest
        pixels, rows = [], []
        for name in names:
            row = {"file": printable(name), "prediction": -1, "class": "", "exit": -1, "confidence": float("nan")}
            rows.append({**row, "macs": 0, "error": ""})
            try:
                pixels.append(prepared(self._images / name, said.input_size, said.preparation).astype(said.dtype))
            except DataError as error:
                rows[-1]["error"] = str(error)
        if pixels:
            found = self._runner.predict(np.stack(pixels))
            classes = self._runner.class_names
            columns = (found.logits.argmax(1), found.exit, found.confidence, found.macs)
            for row, (number, exit, confidence, macs) in zip(
                (row for row in rows if not row["error"]), zip(*(c.tolist() for c in columns), strict=True), strict=True
            ):
                row |= {"prediction": number, "class": classes[number] if classes else str(number)}
                row |= {"exit": exit, "confidence": confidence, "macs": macs}
        return rows


def _batches(names: Sequence[str], size: int) -> list[tuple[str, ...]]:
    every = iter(names)
    return list(iter(lambda: tuple(itertools.islice(every, size)), ()))


def _begin(out: Path, job: dict[str, Any]) -> None:
    """Make the folder, or see that it is of the same job; what was half written is removed.

    Raises:
        CheckpointError: it is of another.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / _JOB
    if not path.is_file():
        if any(out.iterdir()):
            raise CheckpointError(f"{str(out)!r} holds something else than answers; choose another --out")
        path.write_text(json.dumps(job))
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged; begin anew in another --out") from error
    for key, value in job.items():
        if before.get(key) != value:
            told = {"model": "another model", "images": "other images", "part": f"parts of {before.get('part')}"}[key]
            raise CheckpointError(f"{str(out)!r} was begun with {told}; go on with that, or choose another --out")
    for half in out.glob(".*.tmp"):
        half.unlink()


def _file(out: Path, number: int) -> Path:
    return out / f"part-{number:06}.parquet"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    # By process: one whose job was killed may still be at work.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    temporary.replace(path)


def _digest_of(names: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
