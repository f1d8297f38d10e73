"""Models to the Hugging Face Hub: the file of `dynnet.save`, and a card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dynnet.backbone.names import title
from dynnet.files.checkpoints import save
from dynnet.files.hub import FILE, PREFIX, Address, asking, endpoint
from dynnet.model import DynamicModel


def push_to_hub(
    model: nn.Module,
    repo: str,
    *,
    results: Mapping[str, Any] | None = None,
    card: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create: Mapping[str, Any] | None = None,
) -> str:
    """Put a model on the hub, in one commit: its file and a card.

    Args:
        model: as for `dynnet.save`.
        repo: "OWNER/NAME"; it is made if it is not there.
        results: of the model, as `results.json` of a report or of the zoo has them; they go into the card.
        card: text of README.md in place of the one that is made.
        private: as for `huggingface_hub.HfApi.create_repo`.
        revision: branch to commit to; by default the main one.
        token: of the hub; by default the one that is logged in.
        create: as for `dynnet.save`.

    Returns:
        The address that `dynnet.load` takes, of the commit.

    Raises:
        CheckpointError: the hub refuses, or there is no network.
    """
    from huggingface_hub import HfApi

    address = Address.of(repo)
    api = HfApi(endpoint=endpoint(), token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / FILE, create)
        (Path(folder) / "README.md").write_text(card if card is not None else card_of(model, address, results or {}))
        asking(address, lambda: api.create_repo(address.repo, private=private, exist_ok=True))
        done = asking(
            address,
            lambda: api.upload_folder(
                repo_id=address.repo, folder_path=folder, revision=revision, commit_message=f"{title(model)} by dynnet"
            ),
        )
    return str(Address(address.repo, done.oid))


def card_of(model: nn.Module, address: Address, results: Mapping[str, Any]) -> str:
    """A card: what the model is, what was measured of it, how to use it."""
    lines = [
        "---",
        "library_name: dynnet",
        "pipeline_tag: image-classification",
        "tags: [dynnet, timm, early-exit]",
        "---",
    ]
    inner = model.backbone if isinstance(model, DynamicModel) else model
    lines += [f"# {address.repo.partition('/')[2]}", "", f"{title(inner)}, made with dynnet."]
    if isinstance(model, DynamicModel) and model.exits:
        ledger = model.ledger()
        lines += ["", "| exit | at, of the MACs | head | threshold |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {boundary.name} | {boundary.macs_share:.0%} | {head / ledger.dense:.1%} | {threshold:.4g} |"
            for boundary, head, threshold in zip(model.boundaries, ledger.heads, model.thresholds, strict=True)
        ]
    if {"accuracy", "mean_macs", "dense_macs", "dataset"} <= results.keys():
        lines += [
            "",
            f"On {results['dataset']}: accuracy {results['accuracy']:.2%}"
            + (f" (bare backbone {results['dense_accuracy']:.2%})" if "dense_accuracy" in results else "")
            + f" at {results['mean_macs'] / results['dense_macs']:.0%} of {results['dense_macs'] / 1e6:.1f} M MACs in "
            f"the mean.",
        ]
    lines += [
        "",
        "```python",
        "import dynnet",
        "",
        f'model = dynnet.load("{PREFIX}{address.repo}")',
        "prediction = model.predict(images)  # logits, exit, confidence, macs",
        "```",
        "",
    ]
    return "\n".join(lines)
