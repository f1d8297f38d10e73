"""Members of a cascade: what they have learnt, were chosen for and are made of goes along."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynnet
from dynnet.backbone.host import prepare_
from dynnet.cascading import members_of
from dynnet.errors import CascadeError
from tests.cases import CLASSES
from tests.gates.routed import routed
from tests.test_cascading import LARGE, SMALL, alive, images


def test_members_of_several_widths_keep_what_each_remembers() -> None:
    member, gates, x = routed(LARGE)
    gates.lean_(20.0)  # narrow ones, of which batch norms remember something else
    model = dynnet.cascade([member, alive(LARGE, 1)])
    model.thresholds = [*model.thresholds[:-1], -float("inf")]
    expected = member.predict(x)
    for one in (model, dynnet.cascade(members_of(model))):
        one.thresholds = model.thresholds
        found = one.predict(x)
        torch.testing.assert_close(found.logits, expected.logits)
        assert found.macs.tolist() == expected.macs.tolist()
    gates.choose([0] * len(gates.plan.regions))
    with pytest.raises(CascadeError, match="the gates of member 0 are frozen, which a cascade cannot keep"):
        dynnet.cascade([member, alive(LARGE, 1)])


def test_members_may_be_of_half_precision_and_call_classes_in_lists() -> None:
    small, large = (alive(case, 0).bfloat16() for case in (SMALL, LARGE))
    prepare_(large, {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.3, 0.3)})
    names: Any = [str(number) for number in range(CLASSES)]
    small.pretrained_cfg = {**small.pretrained_cfg, "label_names": names}  # type: ignore[dict-item]
    model = dynnet.cascade([small, large])
    assert model.class_names == tuple(names)
    assert model.predict(images().bfloat16()).logits.dtype == torch.bfloat16
    with pytest.raises(CascadeError, match=r"members have \['bfloat16', 'float32'\] types"):
        dynnet.cascade([small, large.float()])


def test_patience_of_a_member_is_as_long_as_it_was() -> None:
    member = dynnet.wrap(alive(LARGE, 1), ["layer1", "layer2"], input_size=LARGE.size, confidence="patience").eval()
    member.thresholds = [2 / 3, 2 / 3]  # two in agreement
    model = dynnet.cascade([member, alive(LARGE, 2)])
    assert model.thresholds == (0.5, 0.5, float("inf"))  # of four
