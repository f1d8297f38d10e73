"""Files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dynnet
from dynnet.errors import CheckpointError
from dynnet.files import bundles as bundle


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    start = whole.index(b'"format"')
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(len(whole), (12,), generator=generator).tolist()
    for position in [8, 100, len(whole) - 1, *anywhere, *range(start, start + 14)]:
        for bit in range(8) if position in range(start, start + 14) else (2,):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            saved.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"m.safetensors' (is|has|holds)"):
                dynnet.load(saved)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncation_is_noticed(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        dynnet.load(saved)


def test_a_newer_format_asks_for_an_upgrade(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, about = bundle.read_bundle(saved)
    monkeypatch.setattr(bundle, "FORMAT", bundle.FORMAT + 1)
    bundle.write_bundle(saved, tensors, about)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 3, this dynnet reads up to 2; upgrade dynnet"):
        dynnet.load(saved)


def test_a_crash_while_writing_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def crash(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(bundle.os, "fsync", crash)
    with pytest.raises(CheckpointError, match="cannot write .*disk full; make room for it, or choose another folder"):
        bundle.write_bundle(saved, {"x": torch.zeros(3)}, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_tied_and_strided_tensors_are_written(tmp_path: Path) -> None:
    shared = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    bundle.write_bundle(tmp_path / "f", {"a": shared, "b": shared[1:], "n": torch.tensor(3)}, {"kind": "test"})
    tensors, about = bundle.read_bundle(tmp_path / "f")
    assert torch.equal(tensors["a"], shared)
    assert torch.equal(tensors["b"], shared[1:])
    assert about == {"kind": "test"}
    assert json.loads(json.dumps(about)) == about
