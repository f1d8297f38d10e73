"""A small model to be exported, and what it means that a runner answers as it does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import dynnet
from dynnet.deploy import Runner
from tests.cases import leave_one_by_one, tiny

SIZE = (3, 32, 32)


def two_exits(images: Tensor) -> dynnet.DynamicModel:
    """With thresholds at which some of these images leave at each exit."""
    torch.manual_seed(0)
    model = dynnet.wrap(tiny(), ["0", "1"], input_size=SIZE)
    leave_one_by_one(model, images)
    return model


def agree(runner: Runner, model: dynnet.DynamicModel, x: Tensor) -> None:
    ours, theirs = runner.predict(x.numpy()), model.predict(x)
    assert (ours.exit == theirs.exit.numpy()).all()
    assert (ours.macs == theirs.macs.numpy()).all()
    np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.confidence, theirs.confidence.numpy(), rtol=0, atol=1e-4)
