"""On a GPU everything holds that holds on a CPU: `make gpu` runs these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dynnet
from dynnet import DynamicModel, GateConfig
from dynnet.backbone.chain import bare_of
from dynnet.deploy import Runner
from dynnet.learning.losses import loss
from tests.cases import FEW, Case
from tests.gates.routed import WIDTHS

DEVICE = torch.device("cuda")
KINDS = {"exits": None, "channels": GateConfig(unit=2), "widths": GateConfig(unit=2, widths=WIDTHS)}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.fixture(autouse=True)
def exact() -> None:
    """TensorFloat-32 rounds more than these comparisons allow."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> DynamicModel:
    return FEW[0].wrapped(gates=KINDS[request.param]).to(DEVICE)


def images(count: int) -> torch.Tensor:
    return FEW[0].images(count).to(DEVICE)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_who_never_exits_gets_the_backbones_answer(case: Case) -> None:
    model = case.wrapped().to(DEVICE)
    model.thresholds = [float("inf")] * len(model.exits)
    given = case.images(4).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(model.predict(given).logits, bare_of(model)(given))


def test_the_answer_and_bill_of_an_image_are_its_own(model: DynamicModel) -> None:
    given = images(6)
    sure = model.forward_exits(given).logits[0].detach().softmax(1).amax(1).sort().values
    model.thresholds = [float(sure[2:4].mean()), *[float("inf")] * (len(model.exits) - 1)]
    together = model.predict(given)
    assert together.logits.device.type == DEVICE.type
    assert 0 < int((together.exit == 0).sum()) < 6
    for row in range(6):
        alone = model.predict(given[row : row + 1])
        assert int(alone.exit) == int(together.exit[row])
        assert int(alone.macs) == int(together.macs[row])
        assert torch.allclose(alone.logits, together.logits[row : row + 1], rtol=1e-3, atol=1e-3)


def test_it_answers_as_on_the_cpu(model: DynamicModel) -> None:
    given = images(6)
    here = model.predict(given)
    there = model.to("cpu").predict(given.cpu())
    assert here.exit.tolist() == there.exit.tolist()
    assert here.macs.tolist() == there.macs.tolist()
    assert torch.allclose(here.logits.cpu(), there.logits, rtol=1e-3, atol=1e-3)


def test_it_learns_in_half_precision_too(model: DynamicModel) -> None:
    model.train()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = model(images(8))
    found = loss(outputs, torch.randint(model.num_classes, (8,), device=DEVICE))
    found.backward()
    assert bool(found.isfinite())
    gradients = [p.grad for p in model.heads.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_thresholds_are_fitted_and_times_measured_there(model: DynamicModel) -> None:
    loader = [(images(32), torch.randint(model.num_classes, (32,)))]
    found = dynnet.calibrate(model, loader, budget=0.9)
    assert found.macs <= 0.9 * model.ledger().dense
    timed = dynnet.latency(model, images(16), calls=10)
    assert bool(np.isfinite(timed.dynamic_ms).all())


@pytest.mark.filterwarnings("ignore:gates close other channels")
def test_the_engine_there_answers_as_pytorch_does(model: DynamicModel, tmp_path: Path) -> None:
    given = images(6)
    expected = model.predict(given)
    dynnet.export(model, tmp_path / "stages", engine="torch")
    found = Runner(tmp_path / "stages").predict(given.cpu().numpy())
    assert found.exit.tolist() == expected.exit.tolist()
    assert np.abs(found.logits - expected.logits.cpu().numpy()).max() < 1e-3
