"""Single weights set to zero: masks, patterns, tickets."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import dynnet
from dynnet.backbone.batches import Batches
from dynnet.backbone.masks import is_masked
from dynnet.errors import CheckpointError, NonFiniteError, PruneError
from dynnet.pruning import (
    make_permanent_,
    rewind_,
    scheduled,
    single_weights,
    sparsify_,
    sparsify_n_m_,
    sparsity,
    to_semi_structured_,
)
from dynnet.pruning.criteria.weights import score_weights
from dynnet.pruning.single_weights import weighted_layers
from tests.cases import tiny


def train(model: nn.Module, steps: int = 3, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.randint(0, 5, (8,))).backward()
        optimizer.step()


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight.detach() == 0 for name in weighted_layers(model, ())}


@pytest.mark.parametrize("share", [0.0, 0.1234, 0.5, 0.987])
def test_the_least_weights_of_all_layers_are_zero_to_the_last_one(share: float) -> None:
    model = tiny()
    before = torch.cat([model.get_submodule(n).weight.detach().flatten() for n in weighted_layers(model, ())])
    sparsify_(model, share)
    after = torch.cat([model.get_submodule(n).weight.detach().flatten() for n in weighted_layers(model, ())])
    count = round(share * len(before))
    assert int((after == 0).sum()) == count
    assert torch.equal(after[after != 0], before[after != 0])
    if count:
        assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    assert sparsity(model)[""] == pytest.approx(count / len(before))


def test_every_layer_can_lose_the_same_share() -> None:
    model = tiny()
    sparsify_(model, 0.75, scope="layer")
    for name in weighted_layers(model, ()):
        weight = model.get_submodule(name).weight
        assert int((weight == 0).sum()) == round(0.75 * weight.numel())


def test_more_entries_than_single_precision_can_count() -> None:
    model = nn.Sequential(nn.Linear(4099, 4099, bias=False))  # above 2 ** 24, where quantiles once gave up
    sparsify_(model, 0.8)
    assert int((model[0].weight == 0).sum()) == round(0.8 * 4099**2)


def test_masks_survive_training_copies_and_state_dicts() -> None:
    model = tiny(classes=5)
    sparsify_(model, 0.6)
    expected = zeros(model)
    before = model[0][0].weight.detach().clone()
    train(model.train())
    assert not torch.equal(model[0][0].weight, before)
    for found in (model, copy.deepcopy(model)):
        assert all(torch.equal(mask, expected[name]) for name, mask in zeros(found).items())
    other = tiny(classes=5)
    sparsify_(other, 0.1)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(mask, expected[name]) for name, mask in zeros(other).items())

    images = torch.randn(2, 3, 32, 32)
    model.eval()
    answers = model(images)
    make_permanent_(model)
    assert torch.equal(model(images), answers)
    assert set(model.state_dict()) == set(tiny(classes=5).state_dict())
    assert all(torch.equal(mask, expected[name]) for name, mask in zeros(model).items())


def test_masks_only_grow() -> None:
    model = tiny(classes=5)
    masks = []
    for step in range(1, 4):
        sparsify_(model, scheduled("cubic", 0.9, step, 3))
        train(model.train(), seed=step)
        masks.append(torch.cat([m.flatten() for m in zeros(model).values()]))
    assert bool((masks[0] <= masks[1]).all())
    assert bool((masks[1] <= masks[2]).all())
    assert masks[2].double().mean() == pytest.approx(0.9, abs=1e-4)
    with pytest.raises(PruneError, match=r"sparsity=0.5, but 0.9.* masked already"):
        sparsify_(model, 0.5)
    assert sparsity(model)[""] == pytest.approx(0.9, abs=1e-4)


def test_schedules_end_where_they_should() -> None:
    for schedule, half in (("linear", 0.4), ("cubic", 0.7)):
        assert scheduled(schedule, 0.8, 0, 4) == 0
        assert scheduled(schedule, 0.8, 2, 4) == pytest.approx(half)
        assert scheduled(schedule, 0.8, 4, 4) == pytest.approx(0.8)
    with pytest.raises(PruneError, match="choose from linear, cubic"):
        scheduled("square", 0.8, 1, 2)  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="step=3, steps=2"):
        scheduled("cubic", 0.8, 3, 2)


def test_a_ticket_is_its_early_weights_under_its_late_mask() -> None:
    model = tiny(classes=5)
    early = copy.deepcopy(model.state_dict())
    train(model.train())
    sparsify_(model, 0.8)
    mask = zeros(model)
    rewind_(model, early)
    make_permanent_(model)
    for name, gone in mask.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, torch.where(gone, 0.0, early[name + ".weight"]))
    assert torch.equal(model[0][1].running_mean, early["0.1.running_mean"])
    with pytest.raises(PruneError, match="lack '0.0.weight'"):
        rewind_(model, tiny(channels=1).state_dict())
    with pytest.raises(PruneError, match=r"'0\.0\.bias' of the earlier weights is the model's own"):
        rewind_(model, model.state_dict())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_every_m_neighbours_stay(n: int, m: int) -> None:
    model = tiny()
    before = {name: model.get_submodule(name).weight.detach().clone() for name in weighted_layers(model, ())}
    left = sparsify_n_m_(model, n, m)
    assert left == ["0.0"]  # it reads three channels
    for name in set(before) - set(left):
        after = model.get_submodule(name).weight.detach()
        groups = after.movedim(1, -1).unflatten(-1, (-1, m))
        assert bool(((groups != 0).sum(-1) == n).all())
        was = before[name].movedim(1, -1).unflatten(-1, (-1, m)).abs()
        assert torch.equal(was.topk(n, -1).values.sort(-1).values, groups.abs().sort(-1).values[..., -n:])
    with pytest.raises(PruneError, match=r"has a mask .*make_permanent_\(model\) first"):
        sparsify_n_m_(model, n, m)


def test_sparse_cores_take_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10))
    sparsify_n_m_(model, exclude=["1"])
    make_permanent_(model)
    assert torch.cuda.is_available() or to_semi_structured_(model) == []

    def converted(weight: torch.Tensor) -> torch.Tensor:
        if len(weight) % 16:
            raise RuntimeError("shape is not supported")
        return weight + 0

    monkeypatch.setattr(single_weights, "_has_sparse_cores", lambda weight: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", converted)
    assert to_semi_structured_(model) == ["0"]  # the second has too many weights, the third no shape for it
    assert [layer.weight.requires_grad for layer in model] == [False, True, True]


def test_standardised_weights_are_left_alone() -> None:
    model = timm.create_model("test_nfnet", num_classes=4).eval()
    sparsify_(model, 0.9)
    masked = {name for name, module in model.named_modules() if is_masked(module)}
    standardised = {name for name, module in model.named_modules() if isinstance(module, ScaledStdConv2d)}
    assert standardised
    assert masked
    assert not masked & standardised


def test_weights_are_worth_what_the_formulas_say() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    model, w = nn.Sequential(nn.Flatten(), layer).eval(), layer.weight.detach()
    batches = [(torch.randn(4, 6, 1, 1), torch.randint(0, 3, (4,))) for _ in range(3)]
    slopes = [torch.autograd.grad(F.cross_entropy(model(x), y), layer.weight)[0] for x, y in batches]
    inputs = torch.cat([x.flatten(1) for x, _ in batches])
    expected = {
        "magnitude": w.abs(),
        "taylor": torch.stack([(g * w).abs() for g in slopes]).mean(0),
        "fisher": torch.stack([g.square() * w.square() / 2 for g in slopes]).mean(0),
        "activation": w.abs() * inputs.norm(dim=0),
    }
    for criterion, values in expected.items():
        found = score_weights(model, ["1"], criterion, Batches(batches))["1"]
        assert torch.allclose(found, values, rtol=1e-4, atol=1e-8), criterion


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "hessian", "activation", "random"])
def test_other_criteria_choose_other_weights(criterion: str) -> None:
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(0, 4, (4,))) for _ in range(2)]
    model, by_magnitude = tiny(), tiny()
    sparsify_(model, 0.5, batches, criterion=criterion)
    sparsify_(by_magnitude, 0.5)
    assert sparsity(model)[""] == pytest.approx(0.5, abs=1e-4)
    assert any(not torch.equal(mask, zeros(by_magnitude)[name]) for name, mask in zeros(model).items())


def test_a_sparse_file_is_small_and_reads_back_bit_for_bit(tmp_path: Path) -> None:
    model = timm.create_model("cifar_resnet20", num_classes=5).eval()
    sparsify_(model, 0.9)
    with pytest.raises(CheckpointError, match="make_permanent"):
        dynnet.save(model, tmp_path / "x.safetensors")
    make_permanent_(model)
    dynnet.save(model, tmp_path / "dense.safetensors")
    dynnet.save(model, tmp_path / "sparse.safetensors", sparse=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("dense", "sparse")]
    assert sizes[1] < 0.25 * sizes[0]
    again = dynnet.load(tmp_path / "sparse.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_squares_of_halves_do_not_vanish() -> None:
    model = tiny(classes=4)
    batches = [(1e-2 * torch.randn(4, 3, 32, 32), torch.randint(0, 4, (4,)))]
    layers = weighted_layers(model, ())
    expected = score_weights(model, layers, "fisher", Batches(batches))
    halves = [(images.bfloat16(), labels) for images, labels in batches]
    found = score_weights(model.bfloat16(), layers, "fisher", Batches(halves))
    assert {scores.dtype for scores in found.values()} == {torch.float32}
    small = score_weights(model.half(), layers, "fisher", Batches([(x.half(), y) for x, y in batches]))
    for name in layers:
        assert ((small[name] == 0).double().mean() - (expected[name] == 0).double().mean()).abs() < 0.1


def test_weights_that_are_no_plain_parameters_are_refused() -> None:
    normed = tiny()
    nn.utils.parametrizations.weight_norm(normed[1][0])
    torchs = tiny()
    prune.l1_unstructured(torchs[1][0], "weight", 0.5)
    tied = tiny()
    tied[3] = nn.Sequential(copy.deepcopy(tied[2][0]), copy.deepcopy(tied[2][0]))
    tied[3][1].weight = tied[3][0].weight
    for model, message in (
        (normed, r"1\.0 has a parametrization that is no mask"),
        (torchs, r"the weights of 1\.0 are no parameter"),
        (tied, r"3\.0 and 3\.1 share their weights"),
    ):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(PruneError, match=message):
            sparsify_(model, 0.5)
        assert model.state_dict().keys() == before.keys()
    with pytest.raises(CheckpointError, match="no mask"):
        dynnet.save(normed, "never.safetensors")


def test_a_layer_that_never_runs_has_no_activation() -> None:
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lent = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.lent.weight)

    with pytest.raises(PruneError, match="the forward of lent does not run, .* exclude it, or choose another"):
        sparsify_(Borrowing(), 0.5, [torch.randn(2, 4)], criterion="activation")


def test_bad_input_leaves_the_model_untouched() -> None:
    model = tiny()
    for call, message in [
        (lambda: sparsify_(model, 1.0), r"sparsity=1.0: give a share of the weights in \[0, 1\)"),
        (lambda: sparsify_(model, 0.5, criterion="magnitud"), "did you mean 'magnitude'"),
        (lambda: sparsify_(model, 0.5, scope="all"), "choose from global, layer"),  # type: ignore[arg-type]
        (lambda: sparsify_(model, 0.5, exclude=["9"]), "has no module '9'"),
        (lambda: sparsify_n_m_(model, 4, 2), "0 < n < m"),
        (lambda: sparsify_n_m_(model, 2, 7), "multiple of m=7"),
    ]:
        with pytest.raises(PruneError, match=message):
            call()
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity for 1 of the .* weights of 5"):
        sparsify_(model, 0.5)
    assert not any("mask" in name for name in model.state_dict())
