"""Gated models, for the tests of this room."""

from __future__ import annotations

import torch
from torch import Tensor

import dynnet
from dynnet.gates.plan import GateConfig
from tests.cases import CASES, Case, enliven, open_at_random

# Its halves are cut out by numbers written down in its code.
CLOSED = {"test_mambaout"}
GATED = [case for case in CASES if case.name not in CLOSED]
SMALL = Case("cifar_resnet20", (3, 32, 32))


def gated(case: Case = SMALL, exits: object = (), unit: int = 8, **kwargs) -> dynnet.DynamicModel:
    backbone = case.backbone()
    enliven(backbone)
    model = dynnet.wrap(backbone, exits, gates=GateConfig(unit=unit), input_size=case.size, **kwargs)
    open_at_random(model)
    return model


def predict_alone(model: dynnet.DynamicModel, images: Tensor) -> dynnet.Prediction:
    """Sparse: one image at a time."""
    model.execution = "sparse"
    found = [model.predict(images[i : i + 1]) for i in range(len(images))]
    return dynnet.Prediction(*(torch.cat(column) for column in zip(*found, strict=True)))


def difference(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())
