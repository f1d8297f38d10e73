"""Which of timm's architectures take exits, at 1/3 and 2/3 of the MACs, what share of their MACs gates can switch, and
which can be pruned to half of their MACs.

    python -m eval.coverage --out runs/coverage.csv
    python -m eval.coverage --names 'resnet*' --real_params 0

Every name is wrapped on the meta device, where rows leave at both exits. Pruned, it must cost 50% (+-3) of its MACs and
run forward and backward. Names of up to `real_params` million parameters run with numbers, the others on the meta
device, where shapes tell: with numbers, never exiting must equal plain timm bit for bit, and every row of a batch whose
rows leave at different exits must equal that row run alone. A table that is there already is completed, not begun anew.
"""

from __future__ import annotations

import csv
import fnmatch
import gc
import time
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from tqdm import tqdm

from dynnet import prune, wrap
from dynnet.backbone.dry_run import trace
from dynnet.backbone.gradients import at_risk, right_gradients
from dynnet.backbone.input_size import input_size_of
from dynnet.errors import DynnetError, GateError, PruneError
from dynnet.evaluation.verification import InTurn

COLUMNS = (
    "name", "wrapped", "exits", "shares", "gmacs", "mparams", "unpriced", "gated", "pruned", "real", "identical",
    "alone_error", "bare_error", "reason", "gate_reason", "prune_reason", "seconds",
)  # fmt: skip
TOLERANCE = 1e-4


def main(out: Path = Path("runs/coverage.csv"), names: str = "*", real_params: float = 60.0) -> None:
    """Try exits on timm's architectures.

    Args:
        out: the table, one line a name.
        names: only architectures that match this pattern.
        real_params: run with numbers up to this many million parameters; 0 for none.
    """
    wanted = [name for name in timm.list_models() if fnmatch.fnmatch(name, names)]
    out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = {}
    if out.exists():
        with out.open(newline="") as file:
            reader = csv.DictReader(file)
            done = {row["name"]: row for row in reader}
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise SystemExit(f"error: {str(out)!r} has other columns than {', '.join(COLUMNS)}; choose another --out")
    else:
        with out.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
    for name in tqdm([n for n in wanted if n not in done], disable=None):
        row = examine(name, real_params)
        with out.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        done[name] = {k: str(v) for k, v in row.items()}
        gc.collect()
    print(summary([done[name] for name in wanted]))


def summary(rows: list[dict[str, Any]]) -> str:
    """What the table says, in a few lines."""
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


def examine(name: str, real_params: float) -> dict[str, Any]:
    """One line of the table."""
    began = time.monotonic()
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"name": name, "wrapped": False, "real": False}
    try:
        backbone = _create(name, meta=True)
        model = wrap(backbone, exits=[1 / 3, 2 / 3])
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
    row["seconds"] = f"{time.monotonic() - began:.1f}"
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
    backbone = _create(name, meta=not real).eval()
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
    backbone = _create(name, meta=False).eval()
    images = torch.randn(3, *input_size_of(backbone))
    plain = backbone(images)
    # Rounding, as timm itself has it: some untrained networks blow it up.
    bare = _difference(torch.cat([backbone(images[i : i + 1]) for i in range(3)]), plain)
    model = wrap(backbone, exits=[1 / 3, 2 / 3])
    identical = torch.equal(model(images), plain)
    model.measure, model.thresholds = InTurn(2), [1.0, 1.0]
    mixed = model.predict(images)
    alone = [model.forward_exits(images[i : i + 1]).logits[i] for i in range(3)]
    left = mixed.exit.tolist()
    return {
        "identical": identical,
        "alone_error": f"{_difference(torch.cat(alone), mixed.logits):.1e}",
        "bare_error": f"{bare:.1e}",
        "reason": "" if left == [0, 1, 2] else f"rows left at {left}, not one at each exit",
    }


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest of any row, relative to its largest logit, absolute below one."""
    return float(((a - b).abs().amax(1) / a.abs().amax(1).clamp(min=1)).max())


def _create(name: str, meta: bool) -> nn.Module:
    # Encoders without a classifier of their own get one.
    with torch.device("meta" if meta else "cpu"):
        return timm.create_model(name, num_classes=1000)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
