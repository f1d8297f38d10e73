"""Files with random damage, and files that say random things under a right SHA-256: refused in words, or right."""

from __future__ import annotations

import json
import random
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynnet
from dynnet.errors import CheckpointError
from dynnet.files.bundles import read_bundle, write_bundle
from tests.cases import CLASSES, FEW, Case, tiny
from tests.watching import watched

CASE: Case = FEW[0]
NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**9, 10**12, -(10**30), 0.5, 1e308, -0.0, float("nan"), float("inf")),
    *("", "x", "layer1", "fc", "../../etc/passwd", "hf-hub:a/b", "http://localhost/", "inf", "\u0000", "é" * 1000),
    *([], [[]], [1], [0, 0], [1] * 3, [10**9] * 3, ["layer1"] * 2, {}, {"": {}}, {"layer1": [1, 1]}, {"a": {"b": 1}}),
]


def kinds(folder: Path) -> dict[str, Path]:
    """Small files of every kind that `save` writes."""
    plain = CASE.backbone()
    thin = dynnet.prune(plain, macs=0.5, criterion="l2", multiple=1, input_size=CASE.size)
    create = {"model_name": CASE.name, "num_classes": CLASSES}
    models: dict[str, nn.Module] = {
        "plain": plain,
        "wrapped": CASE.wrapped(),
        "gated": dynnet.wrap(CASE.backbone(), 1, gates="channel", input_size=CASE.size),
        "thin": thin,
        "folded": dynnet.fold(CASE.wrapped()),
    }
    for name, model in models.items():
        dynnet.save(model, folder / name, create, sparse=name == "thin")
    return {name: folder / name for name in models}


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A file that lost, gained or changed bytes."""
    content = bytearray(whole)
    for _ in range(rng.choice([1, 1, 3])):
        # Most of a file is numbers: half of the damage goes to what says what they are.
        place = rng.randrange(rng.choice([min(5000, len(content)), len(content)]))
        act = rng.choice(["flip", "cut", "drop", "insert", "swap"])
        if act == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif act == "cut":
            del content[place:]
        elif act == "drop":
            del content[place : place + rng.randrange(1, 64)]
        elif act == "insert":
            content[place:place] = rng.randbytes(rng.randrange(1, 64))
        else:
            content[place : place + 8] = content[place : place + 8][::-1]
        if not content:
            break
    return bytes(content)


def said_otherwise(about: Any, rng: random.Random) -> Any:
    """A description with some of its values changed, lost, doubled or moved."""
    about = json.loads(json.dumps(about))
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = list(_places(about))
        holder, key = rng.choice(places)
        act = rng.choice(["nasty", "nasty", "nasty", "drop", "rename", "move"])
        if act == "nasty":
            holder[key] = rng.choice(NASTY)
        elif act == "drop":
            del holder[key]
        elif act == "rename" and isinstance(holder, dict):
            holder[rng.choice(["x", "", "kind", str(key) + "s"])] = holder.pop(key)
        else:
            other, there = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[there], default=str))
    return about


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from _places(entry)


def held_otherwise(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """The tensors of a file, one of them changed, lost, or of another name."""
    tensors, name = dict(tensors), rng.choice(sorted(tensors))
    tensor = tensors[name]
    changes: list[Callable[[], Tensor]] = [
        lambda: tensor.double(),
        lambda: tensor.to(torch.int32),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.flatten()[:-1],
        lambda: tensor.unsqueeze(0),
        lambda: torch.full_like(tensor.float(), float("nan")),
        lambda: torch.zeros(0),
    ]
    act = rng.choice(["drop", "rename", "change", "change", "change"])
    if act == "change":
        tensors[name] = rng.choice(changes)()
    else:
        del tensors[name]
        if act == "rename":
            tensors[rng.choice([name + "x", "x", ""])] = tensor
    return tensors


def try_files(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Load so many files with damage; how many were refused, and how many taken.

    Raises:
        AssertionError: one did harm.
    """
    rng, outcomes = random.Random(seed), {"refused": 0, "taken": 0}
    files = kinds(folder)
    answers = {name: dynnet.load(path)(CASE.images(2)) for name, path in files.items()}
    contents = {name: (path.read_bytes(), *read_bundle(path)) for name, path in files.items()}
    path = folder / "damaged"
    for number in range(count):
        name = rng.choice(sorted(files))
        whole, tensors, about = contents[name]
        way = rng.choice(["bytes", "said", "said", "held"])
        if way == "bytes":
            path.write_bytes(damaged(whole, rng))
        else:
            about = said_otherwise(about, rng) if way == "said" else about
            write_bundle(path, held_otherwise(tensors, rng) if way == "held" else tensors, about)
        label = f"file {number} of seed {seed}, {name} with other {way}"
        outcome = _loaded(path, rng.choice([None, None, CASE.backbone, tiny]), label)
        outcomes["refused" if outcome is None else "taken"] += 1
        if outcome is not None and way == "bytes":
            assert torch.equal(outcome(CASE.images(2)), answers[name]), f"{label} was taken, and answers otherwise"
    return outcomes


def _loaded(path: Path, make: Callable[[], nn.Module] | None, label: str) -> nn.Module | None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watched() as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model: nn.Module | None = dynnet.load(path, make() if make else None)
        except CheckpointError as error:
            model, told = None, str(error)
        except BaseException as error:
            raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    assert model is not None or repr(str(path)) in told, f"{label}: {told}"
    assert seen == [], f"{label}: {seen}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6, label  # kilobytes
    return model


def test_damaged_files(tmp_path: Path) -> None:
    outcomes = try_files(tmp_path, 150, seed=0)
    assert outcomes["refused"] > 75
    assert outcomes["taken"] > 5


@pytest.mark.sweep
def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    outcomes = try_files(tmp_path, 10_000, seed=1)
    print(outcomes)
    assert outcomes["refused"] > 5000
