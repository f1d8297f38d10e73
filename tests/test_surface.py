"""What users see of the package."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import dynnet
from dynnet.errors import ExitError, InputError, PruneError
from tests.cases import FEW, tiny

VERBS = [name for name in dynnet.__all__ if inspect.isfunction(getattr(dynnet, name))]


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_the_surface_is_small_and_hides_no_module() -> None:
    assert len(dynnet.__all__) <= 21
    for name in dynnet.__all__:
        found = getattr(dynnet, name)
        if not isinstance(found, ModuleType):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(f"dynnet.{name}")
    assert set(dynnet.__all__) <= set(dir(dynnet))


def test_importing_it_waits_for_nothing() -> None:
    heavy = "{'torch', 'timm', 'numpy', 'PIL', 'safetensors', 'matplotlib'} & set(sys.modules)"
    assert run(f"import sys, dynnet; print({heavy})").strip() == "set()"


ORDERS = [
    pytest.param("timm.layers, dynnet", marks=pytest.mark.sweep),
    "dynnet, importlib.util as u; u.find_spec('timm'); import timm.layers",
]


@pytest.mark.parametrize("order", ORDERS)
def test_timm_knows_the_small_backbones_in_any_order(order: str) -> None:
    told = run(f"import {order}; import timm; print(timm.is_model('cifar_resnet20'), timm.__spec__.name)")
    assert told == "True timm\n"


@pytest.mark.parametrize("verb", [*VERBS, "exits.rows"])
def test_examples_of_docstrings_run(verb: str) -> None:
    home = importlib.import_module(getattr(dynnet, verb).__module__ if verb in VERBS else f"dynnet.{verb}")
    documented = getattr(home, verb) if verb in VERBS else home
    tests = doctest.DocTestFinder(recurse=False).find(documented, verb, globs=dict(vars(home)))
    assert sum(len(test.examples) for test in tests) > 0, f"dynnet.{verb} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    for test in tests:
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("load_backbone", "dynnet.load_backbone of version 0.1 is gone; write dynnet.load, which gives whatever"),
        ("unwrap", r"write model.unwrap\(\)"),
        ("backbones", r"timm.create_model\(\"cifar_resnet20\"\)"),
        ("Measurement", "dynnet.evaluation.measurement.Measurement"),
        ("wrp", "module 'dynnet' has no attribute 'wrp'"),
    ],
)
def test_old_names_say_the_new_one(old: str, message: str) -> None:
    with pytest.raises((AttributeError, ImportError), match=message):
        getattr(dynnet, old)


def test_functions_that_change_their_argument_say_so() -> None:
    for name in ("sparsify", "recalibrate", "make_permanent", "rewind", "sparsify_n_m", "to_semi_structured"):
        with pytest.raises(ImportError, match=f"{name} is {name}_ now: it changes the model"):
            getattr(dynnet.pruning, name)


def test_old_names_are_told_to_whoever_imports_them() -> None:
    with pytest.raises(ImportError, match="dynnet.load_backbone of version 0.1 is gone"):
        from dynnet import load_backbone  # noqa: F401
    with pytest.raises(ImportError, match="recalibrate is recalibrate_ now"):
        from dynnet.pruning import recalibrate  # noqa: F401
    with pytest.raises(ImportError, match=r"dynnet.zoo.load is dynnet.create_model\(name\) now"):
        from dynnet.zoo import load  # noqa: F401
    for old, new in (("active", "running"), ("remembers", "measure.every_vote")):
        with pytest.raises(AttributeError, match=f"model.{old} of version 0.1 is model.{new} now"):
            getattr(FEW[0].wrapped(), old)


def test_a_configuration_goes_through_whole() -> None:
    backbone, config = tiny(), dynnet.WrapConfig(exits=("0",), head_share=0.2, input_size=(3, 32, 32))
    model = dynnet.wrap(backbone, config)
    assert model.config == config
    assert dynnet.wrap(model.unwrap(), config, confidence="margin").config.confidence == "margin"
    config = dynnet.pruning.PruneConfig(criterion="l1", macs=0.5, multiple=1)
    thin = dynnet.prune(tiny(), None, config, input_size=(3, 32, 32))
    again = dynnet.prune(tiny(), criterion="l1", macs=0.5, multiple=1, input_size=(3, 32, 32))
    assert [p.shape for p in thin.parameters()] == [p.shape for p in again.parameters()]


def test_unknown_fields_are_told() -> None:
    with pytest.raises(ExitError, match=r"wrap\(\) has no 'head_shar'; did you mean 'head_share'\?"):
        dynnet.wrap(tiny(), 1, head_shar=0.1)
    with pytest.raises(PruneError, match=r"prune\(\) has no 'mac'; did you mean 'macs'\?"):
        dynnet.prune(tiny(), mac=0.5)


def test_plain_models_are_measured_and_timed_where_that_makes_sense() -> None:
    model, images = FEW[0].backbone(), FEW[0].images(6)
    measured = dynnet.measure(model, [(images, torch.zeros(6, dtype=torch.long))])
    assert measured.exit.tolist() == [0] * 6
    assert (measured.macs == measured.ledger.dense).all()
    timed = dynnet.latency(dynnet.fold(model), images, against=model)
    assert timed.dense_ms.shape == timed.dynamic_ms.shape == (6,)
    dynnet.latency(dynnet.fold(model), images, against=model.train())
    assert model.training
    with pytest.raises(InputError, match="no bare backbone to be compared with; give against="):
        dynnet.latency(model, images)
    with pytest.raises(dynnet.errors.CalibrationError, match="is a plain model: it has no exits.*dynnet.wrap first"):
        dynnet.calibrate(model, [], budget=0.5)


def test_what_verbs_return_prints_in_few_lines() -> None:
    model, images = FEW[0].wrapped(), FEW[0].images(20)
    loader = [(images, torch.zeros(20, dtype=torch.long))]
    assert len(str(dynnet.latency(model, images)).splitlines()) <= 2
    assert len(str(dynnet.calibrate(model, loader, accuracy_drop=0.5)).splitlines()) == 1
    assert len(str(dynnet.measure(model, loader)).splitlines()) <= 5
    shown = repr(model)
    assert "exit 0 at layer1 (36% of the MACs), " in shown


def test_a_drop_below_zero_is_a_gain() -> None:
    from dynnet.thresholds.calibration import Calibration

    fitted = Calibration("budget", 0.5, (0.5,), 100, "margin", 0.9, 50, -0.0225, 0.01, 0.88, 100, (0.5, 0.5))
    assert "2.25% ± 1.00% higher expected on new samples" in str(fitted)
    assert "-2.25%" not in str(fitted)


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
@pytest.mark.parametrize("case", FEW[:2], ids=str)
def test_the_loss_trains_a_wrapped_model_in_plain_torch(case, joint: bool) -> None:
    model = case.wrapped().train()
    if not joint:
        model.backbone.requires_grad_(False).eval()
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images, target = case.images(4), torch.arange(4)
    losses = []
    for _ in range(4):
        loss = dynnet.loss(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    assert same is not joint
    with pytest.raises(InputError, match=r"got a Tensor, not what every exit says; call model.train\(\) before"):
        dynnet.loss(model.eval()(images), target)
