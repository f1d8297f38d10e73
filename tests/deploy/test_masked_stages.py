"""Gated models in stages: masked, told so, and billed for what runs. Measures in Python: asked by the runner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dynnet
from dynnet.deploy import Runner
from dynnet.errors import ExportError, ThresholdError
from tests.cases import CASES, tiny

SIZE = (3, 32, 32)


@pytest.mark.parametrize("name", ["cifar_resnet20", pytest.param("test_vit", marks=pytest.mark.sweep)])
def test_what_gates_close_is_zero_and_costs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = next(case for case in CASES if case.name == name)
    model = dynnet.wrap(case.backbone(), 1, gates="channel", input_size=case.size).eval()
    assert model.gates is not None
    for parameter in model.gates.parameters():
        parameter.data += torch.randn_like(parameter)
    model.thresholds, x = [0.0], case.images(6)
    with pytest.warns(UserWarning, match="closed channels are zero, but cost what open ones do"):
        manifest = dynnet.export(model, tmp_path / "stages")
    found, masked = Runner(tmp_path / "stages", threads=1).predict(x.numpy()), model.predict(x)
    np.testing.assert_allclose(found.logits, masked.logits.numpy(), rtol=0, atol=1e-4)
    assert len(set(masked.macs.tolist())) > 1  # gates decide by the image
    ledger = model.ledger()
    deciding = sum(decider.macs for decider in ledger.segments[0].deciders)
    assert (found.macs == ledger.segments[0].macs + ledger.segments[0].head + deciding).all()
    assert manifest.stages[0].macs == found.macs[0]


def spread(logits: Tensor) -> Tensor:
    """Python that no graph holds."""
    return torch.tensor([float(row.max() - row.min()) for row in logits])


@pytest.mark.sweep
def test_a_measure_in_python_is_asked_by_the_runner(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=SIZE, confidence=spread).eval()
    x = torch.randn(12, *SIZE)
    with torch.no_grad():
        middle = [float(spread(logits).quantile(0.5)) for logits in model.forward_exits(x).logits[:-1]]
    model.thresholds = middle
    assert dynnet.export(model, tmp_path / "stages").on_host
    runner = Runner(tmp_path / "stages", threads=1, confidence=lambda logits: logits.max(1) - logits.min(1))
    found, own = runner.predict(x.numpy()), model.predict(x)
    assert found.exit.tolist() == own.exit.tolist()
    assert set(found.exit) == {0, 1, 2}
    np.testing.assert_allclose(found.confidence, own.confidence.numpy(), rtol=1e-4)
    with pytest.raises(ThresholdError, match="spread', is Python code that is not in its graphs; give it"):
        Runner(tmp_path / "stages")
    with pytest.raises(ThresholdError, match="it must give one number a sample"):
        Runner(tmp_path / "stages", confidence=lambda logits: logits).predict(x.numpy())
    with pytest.raises(ExportError, match="export in float"):
        dynnet.export(model, tmp_path / "x", int8=True, loader=[x])
    plain = tmp_path / "plain"
    dynnet.export(tiny(), plain, input_size=SIZE)
    with pytest.raises(ThresholdError, match="the graphs hold 'max_probability'"):
        Runner(plain, confidence=lambda logits: logits[:, 0])
