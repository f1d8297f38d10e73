"""Many processes as one."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import dynnet
from dynnet.errors import DataError
from dynnet.gates.plan import GateConfig
from dynnet.learning import processes
from dynnet.learning.data import load_data
from dynnet.learning.losses import BudgetConfig, budget_loss, expected_macs
from dynnet.learning.processes import World, world
from dynnet.learning.recipes import read_recipe
from eval import report
from tests.cases import open_at_random
from training.distributed import SyncedBatchNorm

ROOT = Path(__file__).parents[2]


def network() -> nn.Module:
    """Plain batch norm, and timm's with an activation inside; an exit, and gates; no dropout, in double precision."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_efficientnet", num_classes=4, drop_rate=0.0)
    model = dynnet.wrap(backbone, ["blocks.1"], input_size=(3, 32, 32), head_share=0.1, gates=GateConfig(unit=4))
    open_at_random(model)
    model.gates.noise = 0.0
    return model.double().train()


def step(model: nn.Module, images: Tensor, here: World) -> float:
    outputs = model(images)
    logits, decisions = outputs.logits, outputs.decisions
    wrapped = getattr(model, "module", model)
    price = decisions.price(wrapped.ledger(), len(images)).double()
    config = BudgetConfig(target=0.3, ramp=0.0)
    expected = expected_macs(logits, price, wrapped.ledger(), config, wrapped.measure).mean()
    budget = budget_loss(here.mean(expected), wrapped.ledger().dense, here.mean(decisions.open_rates()), config, 0.1)
    loss = torch.stack([x.logsumexp(1).mean() for x in logits]).sum() + budget
    loss.backward()
    return loss.item()


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with world() as here:
        assert (here.rank, here.size, here.first) == (rank, 2, rank == 0)
        model = network()
        images = torch.load(Path(folder) / "images.pt")
        parallel = here.parallel(model)
        with SyncedBatchNorm():
            loss = step(parallel, images[rank::2], here)
        total = here.sum(torch.tensor(loss, dtype=torch.float64)) / 2
        gradients = {k: p.grad for k, p in model.named_parameters()}
        buffers = dict(model.named_buffers())
        torch.save((total, gradients, buffers), Path(folder) / f"{rank}.pt")
        here.wait()


def test_two_halves_give_the_loss_and_the_gradients_of_the_whole(tmp_path: Path) -> None:
    images = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    torch.save(images, tmp_path / "images.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    model = network()
    loss = step(model, images, World(0, 1, torch.device("cpu")))
    for rank in range(2):
        total, gradients, buffers = torch.load(tmp_path / f"{rank}.pt")
        assert total.item() == pytest.approx(loss, rel=1e-10)
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-7, atol=1e-10)
        for name, b in model.named_buffers():
            torch.testing.assert_close(buffers[name], b, rtol=1e-9, atol=1e-12)


def test_alone_nothing_is_asked_of_anybody() -> None:
    with world() as here:
        assert (here.rank, here.size, here.first) == (0, 1, True)
        model = nn.Linear(2, 2)
        assert here.parallel(model) is model
        assert here.sum(torch.ones(2)).tolist() == [1, 1]
        here.wait()


@pytest.mark.sweep
def test_processes_that_share_the_images_write_the_same_table(run: Path, tmp_path: Path) -> None:
    """Byte for byte but for times, with a last batch that is not full, and one process more than batches is told."""
    for name in ("one", "two"):
        shutil.copytree(run, tmp_path / name)
    report.main(tmp_path / "one", batch_size=100, latency_samples=5, engine=None)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "eval.report"]
    more = ["--batch_size", "100", "--latency_samples", "5", "--engine", "null"]
    done = subprocess.run([*launcher, str(tmp_path / "two"), *more], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("359 samples: accuracy") == 1
    written = []
    for name in ("one", "two"):
        with (tmp_path / name / "report" / "table.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        kept = [i for i, column in enumerate(header) if "latency" not in column]
        written.append([[row[i] for i in kept] for row in [header, *rows]])
    assert len(written[0]) == 1 + 359
    assert written[0] == written[1]


def test_parts_of_whole_batches_are_joined_in_order(run: Path) -> None:
    """What three processes find, one after the other here, is what one finds, to the last digit."""
    model, data = dynnet.load(run / "model.safetensors"), load_data(read_recipe(run / "recipe.yaml").data)
    whole = dynnet.measure(model, data.loader("test", 100))
    loaders = [data.loader("test", 100, rank=rank, world=3, whole=True) for rank in range(3)]
    rows = np.concatenate([torch.cat(loader.rows()).numpy() for loader in loaders])
    assert sorted(rows.tolist()) == list(range(359))
    joined = processes._joined([dynnet.measure(model, loader) for loader in loaders], np.argsort(rows))
    assert joined.ledger == whole.ledger
    assert joined.table().keys() == whole.table().keys()
    assert all(np.array_equal(column, joined.table()[name]) for name, column in whole.table().items())
    with pytest.raises(DataError, match="2 batches of 'digits' for 3 processes; start fewer, or choose a smaller"):
        data.loader("test", 200, rank=0, world=3, whole=True)
