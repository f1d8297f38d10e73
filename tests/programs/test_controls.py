"""What controls of widths do in the place of routers: they look at nothing, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from dynnet.thresholds.answers import collect
from eval.controls import MEAN, controls
from tests.cases import FEW
from tests.gates.routed import WIDTHS, routed

OFF = float("inf")


def test_controls_do_not_look_and_leave_nothing_behind() -> None:
    model, gates, images = routed(FEW[0])
    model.thresholds = [OFF, OFF]
    loader = [(images.repeat(20, 1, 1, 1), torch.arange(120) % model.num_classes)]
    before = model.predict(images)
    found = controls(model, gates, collect(model, loader), loader)
    after = model.predict(images)
    assert torch.equal(after.logits, before.logits)
    assert after.macs.tolist() == before.macs.tolist()
    alone = [f"width {number + 1} of {len(WIDTHS)} for all" for number in range(len(WIDTHS))]
    assert list(found) == [MEAN, "widths at random, as often", *alone]
    costs = [float(found[name].macs.mean()) for name in alone]
    assert costs == sorted(set(costs))
    assert all(len(set(found[name].macs)) == 1 for name in (MEAN, *alone))
    # In the mean drawing spends about what routers do, who still run; but the same image gets many widths.
    drawn = found["widths at random, as often"].macs
    assert drawn.mean() == pytest.approx(float(before.macs.double().mean()), rel=0.05)
    assert len(set(drawn[::6])) > 1
    assert min(drawn) > costs[0]
