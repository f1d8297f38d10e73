"""A backbone stays as it came: every module in its mode, and nothing of a dry run's on any of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dynnet
from dynnet import DynamicModel
from dynnet.errors import DynnetError, InputError
from tests.cases import CASES, CLASSES, Case, leave_one_by_one, tiny

SIZE = (3, 32, 32)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, *SIZE), torch.arange(6) % 4


def mixed(train: bool) -> nn.Module:
    """In train mode with a frozen batch norm, or in eval mode with a dropout that goes on (Monte Carlo dropout)."""
    backbone = tiny().train(train)
    backbone.insert(5, nn.Dropout(0.5))
    backbone[0][1].train(not train)
    backbone[5].train(not train)
    return backbone


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


VERBS: dict[str, Callable[[DynamicModel, Path], Any]] = {
    "forward": lambda model, _: model(batch()[0]),
    "forward_exits": lambda model, _: model.forward_exits(batch()[0]),
    "measure": lambda model, _: dynnet.measure(model, [batch()]),
    "calibrate": lambda model, _: dynnet.calibrate(model, [batch()], budget=0.9),
    "latency": lambda model, _: dynnet.latency(model, batch()[0], calls=2, warmup=1),
    "verify": lambda model, _: dynnet.verify(model, batch()[0]),
    "ledger": lambda model, _: model.ledger((3, 40, 24)),
    "floor": lambda model, _: model.floor(),
    "fold": lambda model, _: dynnet.fold(model),
    "save": lambda model, folder: dynnet.save(model, folder / "m.safetensors"),
    "loss": lambda model, _: dynnet.loss(model.forward_exits(batch()[0]), batch()[1]),
    "state_dict": lambda model, _: model.load_state_dict(model.state_dict()),
    "copy": lambda model, _: copy.deepcopy(model),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("gates", [None, "channel"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_leaves_every_module_in_its_mode(verb: str, gates: str | None, train: bool, tmp_path: Path) -> None:
    backbone = mixed(train)
    before = modes(backbone)
    model = dynnet.wrap(backbone, ["1"], input_size=SIZE, gates=gates)
    assert modes(backbone) == before
    assert model.training is train
    heads = modes(model)
    VERBS[verb](model, tmp_path)
    assert modes(model) == heads
    assert model.unwrap() is backbone
    assert modes(backbone) == before


def test_predict_leaves_a_dropout_on() -> None:
    backbone = mixed(train=False)
    model = dynnet.wrap(backbone, ["1"], input_size=SIZE)
    before, images = modes(model), batch()[0]
    assert not torch.equal(model.predict(images).logits, model.predict(images).logits)
    assert modes(model) == before


def test_train_and_eval_are_torchs() -> None:
    model = dynnet.wrap(mixed(train=True), ["1"], input_size=SIZE, gates="channel")
    assert model.eval() is model
    assert not any(modes(model).values())
    assert model.train() is model
    assert all(modes(model).values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"exits": ["nowhere"]},
        {"exits": ["0.0"], "heads": lambda boundary, k: nn.Flatten()},
        {"exits": ["1"], "heads": lambda boundary, k: 3},
        {"exits": ["1"], "input_size": (1, 32, 32)},
        {"exits": ["1"], "confidence": "nothing"},
        {"exits": [], "gates": dynnet.GateConfig(exclude=("0", "1", "2"))},
    ],
    ids=lambda wrong: str(sorted(wrong)),
)
def test_a_failed_wrap_leaves_modes(wrong: dict[str, Any]) -> None:
    backbone = mixed(train=True)
    before = modes(backbone), Kept(backbone)
    with pytest.raises(DynnetError):
        dynnet.wrap(backbone, **{"input_size": SIZE, **wrong})
    assert (modes(backbone), Kept(backbone)) == before


def test_a_failed_measurement_leaves_modes() -> None:
    model = dynnet.wrap(mixed(train=True), ["1"], input_size=SIZE)
    before = modes(model)
    for verb in (dynnet.measure, lambda *given: dynnet.calibrate(*given, budget=0.9)):
        with pytest.raises(DynnetError):
            verb(model, [batch(), (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))])
        assert modes(model) == before


class Kept:
    """What the modules of a model keep: attributes, and what lists, dictionaries and sets among them hold."""

    def __init__(self, model: nn.Module) -> None:
        self.held = {
            (name, key): (value, self._content(value))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self._identities() == other._identities()

    def __hash__(self) -> int:
        raise TypeError

    def meta(self) -> list[tuple[str, str]]:
        """Where tensors without numbers are kept."""
        return [
            where
            for where, (value, _) in self.held.items()
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor) and leaf.device.type == "meta"
        ]

    def _identities(self) -> dict[tuple[str, str], Any]:
        return {where: (id(value), [id(x) for x in content]) for where, (value, content) in self.held.items()}

    @staticmethod
    def _content(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [x for item in value.items() for x in item]
        return list(value) if isinstance(value, (list, tuple, set)) else []


class Hoarding(nn.Module):
    """Its forward keeps what it sees: on itself, on a part, in lists, dictionaries and sets, and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny(CLASSES)
        self.shapes: set[tuple[int, ...]] = set()
        self.tables: dict[int, Tensor] = {}
        self.seen: list[Tensor] = []
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[0](x)
        self.features = self.net[1].entered = x
        self.shapes.add(tuple(x.shape))
        self.seen.append(x)
        side = x.shape[-1]
        if side not in self.tables:
            self.tables[side] = torch.arange(side, device=x.device)
        self.last = x.mean((1, 2, 3))
        return self.net[5](self.net[4](self.net[3](self.net[2](self.net[1](x + self.tables[side])))))


class Hoard(Case):
    def backbone(self) -> nn.Module:
        torch.manual_seed(0)
        return Hoarding().eval()


@pytest.mark.parametrize("gates", [None, "channel"])
@pytest.mark.parametrize(
    "case",
    [
        Hoard("hoarding", SIZE),
        *(c for c in CASES if c.name in {"cifar_resnet20", "test_vit", "swin_tiny_patch4_window7_224"}),
    ],
    ids=str,
)
def test_nothing_of_a_dry_run_stays_on_a_backbone(case: Case, gates: str | None) -> None:
    backbone = case.backbone()
    before = Kept(backbone)
    model = dynnet.wrap(backbone, 1, input_size=case.size, gates=gates)
    model.ledger(case.size)
    with contextlib.suppress(InputError):  # ViT and Swin are made for one size
        model.ledger((3, 48, 40))
    dynnet.verify(model, case.images(3))
    model.unwrap()
    assert Kept(backbone) == before
    assert not Kept(backbone).meta()


@torch.no_grad()
def test_what_a_forward_keeps_of_a_real_call_is_its_own() -> None:
    backbone = Hoarding().eval()
    model = dynnet.wrap(backbone, ["net.0", "net.1"], input_size=SIZE)
    leave_one_by_one(model, torch.randn(5, *SIZE))
    model.predict(torch.randn(5, *SIZE))
    model.predict(torch.randn(5, 3, 40, 24))
    model.unwrap()
    assert {shape[1:] for shape in backbone.shapes} == {(8, 16, 16), (8, 20, 12)}
    assert max(shape[0] for shape in backbone.shapes) == 5
    assert set(backbone.tables) == {16, 12}
    assert not Kept(backbone).meta()
