"""`verify`: promises with real numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dynnet
from dynnet.errors import InputError, VerificationError
from tests.cases import CASES, FEW, Case, open_at_random

FAMILIES = {
    "cifar_resnet20", "test_efficientnet", "mobilenetv3_small_050", "regnetx_002", "densenet121", "test_convnext",
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "crossvit_9_240", "hrnet_w18_small", "caformer_s18",
    "coat_lite_tiny",
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FAMILIES], ids=str)
def test_twelve_families_keep_their_promises(case: Case) -> None:
    model = case.wrapped()
    model.thresholds = [0.25, 0.5]
    found = dynnet.verify(model, case.images(3))
    assert len(found.checks) == len(str(found).splitlines()) == 3
    assert model.thresholds == (0.25, 0.5)


@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_gated_models_do_as_well(execution: str) -> None:
    model = FEW[0].wrapped(gates="channel")
    open_at_random(model)
    model.execution = execution
    dynnet.verify(model, FEW[0].images(4))


def test_a_head_that_looks_at_the_batch_is_found() -> None:
    class Neighbourly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(32, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x.mean((2, 3)))
            return x - x.mean(0, keepdim=True)

    model = FEW[0].wrapped(["layer2"], heads=lambda boundary, k: Neighbourly())
    with pytest.raises(VerificationError, match=r"alone equals it in company +BROKEN .*image \d, which leaves at exit"):
        dynnet.verify(model, FEW[0].images(4))


def test_a_bill_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FEW[0].wrapped()
    size = FEW[0].size
    ledger = model.ledger(size)
    monkeypatch.setattr(type(ledger), "bill", lambda self, running: torch.tensor([1, 2, 3]))
    with pytest.raises(VerificationError, match=r"the bill equals the counter +BROKEN .* billed, \d+ counted"):
        dynnet.verify(model, FEW[0].images(4))


def test_images_that_do_not_fit_and_plain_models_are_refused() -> None:
    with pytest.raises(InputError, match="expected float images"):
        dynnet.verify(FEW[0].wrapped(), torch.zeros(3, 1, 32, 32))
    with pytest.raises(InputError, match="is a plain model, and promises nothing; call dynnet.wrap first"):
        dynnet.verify(FEW[0].backbone(), FEW[0].images(4))


def test_one_image_is_too_few() -> None:
    with pytest.raises(InputError, match="got 1 images; give at least two"):
        dynnet.verify(FEW[0].wrapped(), FEW[0].images(1))
