"""Models on the hub, by a stand-in of its API: put there, fetched, and refused where they are none."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import timm
import torch

import dynnet
from dynnet.errors import CheckpointError
from dynnet.files.hub import FILE, Address
from dynnet.files.publishing import push_to_hub
from tests.files.stand_in import Hub, serving

X = torch.randn(2, 3, 32, 32)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
        yield served


def model() -> dynnet.DynamicModel:
    torch.manual_seed(0)
    wrapped = dynnet.wrap(timm.create_model("cifar_resnet20", width=0.25), ["layer1"]).eval()
    wrapped.thresholds = [0.5]
    return wrapped


def test_what_is_put_there_comes_back(hub: Hub) -> None:
    mine = model()
    results = {"accuracy": 0.9, "mean_macs": 2e5, "dense_macs": 4e5, "dataset": "digits"}
    create = {"model_name": "cifar_resnet20", "width": 0.25}
    address = mine.push_to_hub("me/small", results=results, create=create)
    assert address.startswith("hf-hub:me/small@")
    files = hub.found("me/small", "main")[1]
    assert set(files) == {FILE, "README.md"}
    card = files["README.md"].decode()
    assert "library_name: dynnet" in card
    assert "| layer1 |" in card
    assert "On digits: accuracy 90.00% at 50% of 0.4 M MACs" in card
    for text in (address, "hf-hub:me/small", "hf-hub:me/small@main"):
        again = dynnet.load(text)
        assert again.thresholds == (0.5,)
        assert torch.equal(again.predict(X).logits, mine.predict(X).logits)

    # Plain models go there as well, and an older revision stays what it was.
    slim = dynnet.prune(timm.create_model("cifar_resnet20", width=0.5).eval(), macs=0.5, criterion="l1")
    push_to_hub(slim, "me/small", card="mine", create={"model_name": "cifar_resnet20", "width": 0.5})
    assert hub.found("me/small", "main")[1]["README.md"] == b"mine"
    assert torch.equal(dynnet.load("hf-hub:me/small")(X), slim(X))
    assert torch.equal(dynnet.load(address).predict(X).logits, mine.predict(X).logits)


def test_what_is_not_there_is_told(hub: Hub) -> None:
    hub.put("me/empty", {"pytorch_model.bin": pickle.dumps({})})
    for address, words in (
        ("hf-hub:me/nobody", "the hub has no 'me/nobody', or does not show it to you"),
        ("hf-hub:me/empty@v9", "'me/empty' has no revision 'v9'"),
        ("hf-hub:me/empty", f"hf-hub:me/empty holds no {FILE}, which dynnet writes; nothing else is read"),
        ("hf-hub:empty", "names no model of the hub; write hf-hub:OWNER/NAME"),
        ("hf-hub:../../etc/passwd", "names no model of the hub"),
    ):
        with pytest.raises(CheckpointError, match=words):
            dynnet.load(address)


def test_what_is_not_ours_is_refused(hub: Hub, saved_once: bytes) -> None:
    changed = bytearray(saved_once)
    changed[-1] ^= 1
    for name, content, words in (
        ("changed", bytes(changed), "its SHA-256 does not match"),
        ("pickled", pickle.dumps(model), "is truncated or damaged"),
        ("foreign", b"another file under the name", "is truncated or damaged"),
        ("half", saved_once[: len(saved_once) // 2], "is truncated or damaged"),
    ):
        hub.put(f"me/{name}", {FILE: content})
        with pytest.raises(CheckpointError, match=words):
            dynnet.load(f"hf-hub:me/{name}")


def test_a_download_that_breaks_off_leaves_nothing(hub: Hub, saved_once: bytes, tmp_path: Path) -> None:
    hub.put("me/small", {FILE: saved_once})
    hub.broken_off = True
    with pytest.raises(CheckpointError, match="the hub does not serve hf-hub:me/small"):
        dynnet.load("hf-hub:me/small")
    assert not list((tmp_path / "cache").rglob(FILE))
    hub.broken_off = False
    assert dynnet.load("hf-hub:me/small").exits


def test_without_a_network_what_is_at_hand_is_enough(
    hub: Hub, saved_once: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/small", {FILE: saved_once})
    dynnet.load("hf-hub:me/small")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert dynnet.load("hf-hub:me/small").exits
    with pytest.raises(CheckpointError, match="is not on this machine, and the hub cannot be reached"):
        dynnet.load("hf-hub:me/other")
    with pytest.raises(CheckpointError, match="the hub does not serve hf-hub:me/small"):
        model().push_to_hub("me/small", create={"model_name": "cifar_resnet20", "width": 0.25})


def test_addresses_are_read() -> None:
    assert Address.of("hf-hub:me/small@v1.0") == ("me/small", "v1.0")
    assert Address.of("me/small") == ("me/small", None)
    assert str(Address("me/small", "v1")) == "hf-hub:me/small@v1"
