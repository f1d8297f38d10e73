"""Which of timm's architectures take exits, at 1/3 and 2/3 of the MACs, what share of their MACs gates can switch,
which can be pruned to half of their MACs, and which can be exported in stages.

    python -m eval.coverage --out runs/coverage.csv
    python -m eval.coverage --names 'resnet*' --real_params 0
    python -m eval.coverage --engine onnxruntime --only_engine true --jobs 2 --out runs/exported.csv

Every name is wrapped on the meta device, where rows leave at both exits. Pruned, it must cost 50% (+-3) of its MACs and
run forward and backward. Names of up to `real_params` million parameters run with numbers, the others on the meta
device, where shapes tell: with numbers, never exiting must equal plain timm bit for bit, and every row of a batch whose
rows leave at different exits must equal that row run alone. With an engine they are exported too: the graph, cut where
exits answer, must equal eager PyTorch bit for bit, and the engine's answers are held against PyTorch's.

Each name has a process of its own, which may fail. A table that is there already is completed, not begun anew, also by
columns that were not asked for then. Tables of shards are one table below the other.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from torch import nn
from tqdm import tqdm

from dynnet import prune, wrap
from dynnet.backbone.dry_run import trace
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.backbone.input_size import input_size_of
from dynnet.deploy import engines
from dynnet.errors import DynnetError, GateError, InputError, PruneError
from dynnet.evaluation.verification import InTurn
from dynnet.files.bundles import write_atomically
from eval.exportable import AT, create, difference, exported
from eval.isolated import CutShortError, isolated
from eval.programs import errors_told

COLUMNS = (
    "name", "wrapped", "exits", "shares", "gmacs", "mparams", "unpriced", "gated", "pruned", "real", "identical",
    "alone_error", "bare_error", "reason", "gate_reason", "prune_reason", "exported", "cut", "engine_error",
    "export_reason", "seconds",
)  # fmt: skip
TOLERANCE = 1e-4
Row = dict[str, str]


@dataclass(frozen=True)
class Wanted:
    """What is asked about a name, and what that may take."""

    real_params: float
    engine: str | None
    only_engine: bool
    seconds: float
    gigabytes: float
    threads: int | None

    def lacks(self, row: Row) -> bool:
        """Is there anything of it that a row does not say?"""
        return any(self.parts(row))

    def parts(self, row: Row) -> tuple[bool, bool]:
        """Is the model to be examined, and is it to be exported?"""
        no_answer = not (row.get("exported") or row.get("export_reason"))
        return not self.only_engine and not row.get("real"), self.engine is not None and no_answer


def main(
    out: Path = Path("runs/coverage.csv"),
    names: str = "*",
    real_params: float = 60.0,
    engine: str | None = None,
    only_engine: bool = False,
    shard: str = "1/1",
    sample: int | None = None,
    jobs: int = 1,
    seconds: float = 900.0,
    gigabytes: float = 16.0,
) -> None:
    """Try exits on timm's architectures.

    Args:
        out: the table, one line a name.
        names: only architectures that match this pattern.
        real_params: run with numbers up to this many million parameters; 0 for none.
        engine: also export for this engine, "onnxruntime" for example, and compare; slow, so not by default.
        only_engine: nothing but that.
        shard: "2/3" for the second of three parts of the names, with a table of its own.
        sample: only so many of the names, drawn at random, always the same ones.
        jobs: names at a time.
        seconds: that a name may take.
        gigabytes: of memory that a name may take.
    """
    with errors_told():
        if engine is not None:
            engines.engine(engine)
        elif only_engine:
            raise InputError("--only_engine asks for nothing but an engine; give --engine, onnxruntime for example")
        asked = _names(names, shard, sample)
        threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
        wanted = Wanted(real_params, engine, only_engine, seconds, gigabytes, threads)
        done = _read(out)
        _write(out, done)
        missing = [name for name in asked if wanted.lacks(done.get(name, {}))]
        for row in tqdm(_examined(missing, done, wanted, jobs), total=len(missing), disable=None):
            done[row["name"]] = row
            _write(out, done)
        print(summary([done[name] for name in asked]))


def _names(pattern: str, shard: str, sample: int | None) -> list[str]:
    names = [name for name in timm.list_models() if fnmatch.fnmatch(name, pattern)]
    if sample is not None:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:sample].sort().values
        names = [names[i] for i in order]
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"shard={shard!r}: give the number of a part, and of how many, as 2/3")
    return names[int(found[1]) - 1 :: int(found[2])]


def _read(out: Path) -> dict[str, Row]:
    """Rows of a table by name; none, where there is none."""
    if not out.exists():
        return {}
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = {row["name"]: row for row in reader if row.get("name") != "name"}  # tables of shards have each a head
    if unknown := set(reader.fieldnames or ("nothing",)) - set(COLUMNS):
        raise InputError(f"{str(out)!r} has a column {min(unknown)!r}, which is not of {COLUMNS}; choose another --out")
    return rows


def _write(out: Path, rows: dict[str, Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.getvalue().encode())


def _examined(names: Sequence[str], done: dict[str, Row], wanted: Wanted, jobs: int) -> Iterator[Row]:
    """A row for each name, as they are ready."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_row, name, done.get(name, {}), wanted) for name in names]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _row(name: str, before: Row, wanted: Wanted) -> Row:
    """What a row says, and what it lacked."""
    began, row = time.monotonic(), {**dict.fromkeys(COLUMNS, ""), **before, "name": name}
    examining, exporting = wanted.parts(before)
    limits = (wanted.seconds, wanted.gigabytes)
    if examining:
        try:
            row |= _texts(isolated(_on_threads, (wanted.threads, examine, name, wanted.real_params), *limits))
        except CutShortError as error:
            row |= {"wrapped": "False", "real": "False", "reason": str(error)}
    if exporting:
        with tempfile.TemporaryDirectory() as folder:
            given = (wanted.threads, exported, name, wanted.engine, wanted.real_params, folder)
            try:
                row |= _texts(isolated(_on_threads, given, *limits))
            except CutShortError as error:
                row |= {"exported": "False", "cut": "False", "export_reason": str(error)}
    return row | {"seconds": f"{float(before.get('seconds') or 0) + time.monotonic() - began:.1f}"}


def _texts(row: dict[str, Any]) -> Row:
    return {key: str(value) for key, value in row.items() if value != ""}


def _on_threads(count: int | None, function: Any, *arguments: Any) -> Any:
    if count is not None:
        torch.set_num_threads(count)
    return function(*arguments)


def summary(rows: list[dict[str, Any]]) -> str:
    """What the table says, in a few lines."""
    parts = []
    if examined := [r for r in rows if r["real"] != ""]:
        parts.append(_examined_told(examined))
    if asked := [r for r in rows if r["exported"] != "" or r["export_reason"]]:
        parts.append(_exported_told(asked))
    return "\n".join(parts)


def _examined_told(rows: list[dict[str, Any]]) -> str:
    wrapped = [r for r in rows if r["wrapped"] == "True"]
    real = [r for r in rows if r["real"] == "True"]
    identical = [r for r in real if r["identical"] == "True"]
    alone = [r for r in real if r["alone_error"] and float(r["alone_error"]) <= TOLERANCE]
    noisy = [r for r in real if r["alone_error"] and float(r["alone_error"]) > TOLERANCE]
    gated = [float(r["gated"] or 0) for r in rows]
    lines = [
        f"{len(wrapped)} of {len(rows)} architectures take exits at 1/3 and 2/3",
        f"{len(identical)} of {len(real)} run with numbers answer bit for bit as plain timm when nobody exits",
        f"{len(alone)} of {len(real)} answer within {TOLERANCE:g} alone as in a batch that thins out",
    ]
    lines += [
        f"{sum(g >= 0.5 for g in gated)} of {len(rows)} have at least half of their MACs under gates, "
        f"{sum(g > 0 for g in gated)} have some",
    ]
    pruned = [float(r["pruned"]) for r in rows if r["pruned"]]
    halved = sum(0.47 <= share <= 0.53 for share in pruned)
    lines += [f"{halved} of {len(rows)} run forward and backward, pruned to 50% (+-3) of their MACs"]
    lines += [f"  {r['name']}: {r['alone_error']} alone, {r['bare_error']} without exits" for r in noisy]
    lines += [f"  unpriced ops in {r['name']}: {r['unpriced']}" for r in rows if r["unpriced"]]
    lines += [f"  {r['name']}: {r['reason']}" for r in rows if r["reason"]]
    lines += [f"  {r['name']}: {r['gate_reason'][:200]}" for r in rows if r["gate_reason"]]
    lines += [f"  {r['name']}: {r['prune_reason'][:200]}" for r in rows if r["prune_reason"]]
    return "\n".join(lines)


def _exported_told(rows: list[dict[str, Any]]) -> str:
    tried = [r for r in rows if r["exported"]]
    cut = [r for r in tried if r["cut"] == "True"]
    near = [r for r in tried if r["engine_error"] and float(r["engine_error"]) <= TOLERANCE]
    far = [r for r in tried if r["engine_error"] and not float(r["engine_error"]) <= TOLERANCE]  # NaN too
    lines = [
        f"{sum(r['exported'] == 'True' for r in tried)} of {len(tried)} are exported with exits at 1/3 and 2/3, "
        f"{len(rows) - len(tried)} not tried",
        f"{len(cut)} of {len(tried)} answer, cut in stages, bit for bit as eager PyTorch",
        f"{len(near)} of {len(tried)} answer in the engine within {TOLERANCE:g}, also where rows leave at both exits",
    ]
    lines += [f"  {r['name']}: {r['engine_error']} in the engine" for r in far]
    lines += [f"  {r['name']}: {r['export_reason'][:200]}" for r in tried if r["export_reason"]]
    return "\n".join(lines)


def examine(name: str, real_params: float) -> dict[str, Any]:
    """What a line of the table says of a model that is not exported."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"name": name, "wrapped": False, "real": False}
    try:
        backbone = create(name, meta=True)
        model = wrap(backbone, exits=list(AT))
        ledger = model.ledger()
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        row |= {
            "wrapped": True,
            "exits": " ".join(model.exits),
            "shares": " ".join(f"{b.macs_share:.3f}" for b in model.boundaries),
            "gmacs": f"{ledger.dense / 1e9:.3f}",
            "mparams": f"{millions:.1f}",
            "unpriced": " ".join(ledger.unpriced),
        }
        row |= _gated(model.unwrap())
        row |= _pruned(name, millions <= real_params)
        if millions <= real_params:
            row |= {"real": True, **_with_numbers(name)}
    except DynnetError as error:
        row["reason"] = " ".join(str(error).split())
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, AttributeError) as error:
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def _gated(backbone: nn.Module) -> dict[str, Any]:
    try:
        model = wrap(backbone, [], gates="channel")
    except GateError as error:
        return {"gated": "0", "gate_reason": " ".join(str(error).split())}
    assert model.gates is not None
    return {"gated": f"{model.gates.plan.macs_share:.3f}"}


def _pruned(name: str, real: bool) -> dict[str, Any]:
    """Half of the MACs gone; with numbers, or on the meta device."""
    torch.manual_seed(0)
    backbone = create(name, meta=not real).eval()
    size = input_size_of(backbone)
    try:
        try:
            pruned = prune(backbone, macs=0.5, criterion="random")
        except PruneError:
            pruned = prune(backbone, macs=0.53, criterion="random")
        share = trace(pruned, size, 1).macs / trace(backbone, size, 1).macs
        images = torch.randn(2, *size, device="cpu" if real else "meta")
        with right_gradients(at_risk(pruned)):
            pruned.train()(images).sum().backward()
    except Exception as error:  # of any kind: it is the model's own forward and backward
        return {"prune_reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"pruned": f"{share:.3f}"}


@torch.no_grad()
def _with_numbers(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    backbone = create(name, meta=False).eval()
    images = torch.randn(3, *input_size_of(backbone))
    plain = backbone(images)
    # Rounding, as timm itself has it: some untrained networks blow it up.
    bare = difference(torch.cat([backbone(images[i : i + 1]) for i in range(3)]), plain)
    model = wrap(backbone, exits=list(AT))
    identical = torch.equal(model(images), plain)
    model.measure, model.thresholds = InTurn(2), [1.0, 1.0]
    mixed = model.predict(images)
    alone = [model.forward_exits(images[i : i + 1]).logits[i] for i in range(3)]
    left = mixed.exit.tolist()
    return {
        "identical": identical,
        "alone_error": f"{difference(torch.cat(alone), mixed.logits):.1e}",
        "bare_error": f"{bare:.1e}",
        "reason": "" if left == [0, 1, 2] else f"rows left at {left}, not one at each exit",
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
