"""What units of channels are worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynnet.backbone.batches import Batches
from dynnet.channels.finding import find_groups
from dynnet.channels.groups import Group
from dynnet.errors import DataError, NonFiniteError, PruneError
from dynnet.pruning.criteria.units import CRITERIA, score
from tests.cases import CASES, Case, enliven

SIZE = (2, 8, 8)


class Net(nn.Module):
    """Six channels that two layers read, and eight that a residual sum ties; every closed channel is zero when read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.c = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        inner = self.a(x).relu()
        x = x + self.b(inner)
        return self.head(torch.cat([x.mean((2, 3)), self.c(inner).mean((2, 3))], 1))


def net() -> tuple[Net, dict[str, Group]]:
    torch.manual_seed(0)
    model = Net().eval()
    enliven(model)
    groups = [g for g in find_groups(model, SIZE) if g.pinned is None and g.layers("produces")]
    return model, {g.members[0].layer: g for g in groups}


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *SIZE, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def scores(criterion: str, loader: object = None, **kwargs: int) -> dict[str, Any]:
    model, groups = net()
    found = score(model, list(groups.values()), criterion, Batches(loader, **kwargs))  # type: ignore[arg-type]
    return dict(zip(groups, found, strict=True))


def test_the_norm_is_of_all_weights_that_go() -> None:
    model, _ = net()
    inner = (
        model.a.weight.abs().sum((1, 2, 3)) + model.b.weight.abs().sum((0, 2, 3)) + model.c.weight.abs().sum((0, 2, 3))
    )
    assert torch.allclose(scores("l1")["a"], inner.double())
    squares = [model.stem.weight.square().sum((1, 2, 3)), model.b.weight.square().sum((1, 2, 3))]
    squares += [model.a.weight.square().sum((0, 2, 3)), model.head.weight[:, :8].square().sum(0)]
    assert torch.allclose(scores("l2")["stem"], sum(squares).sqrt().double())


def test_slimming_reads_the_scales_of_norms() -> None:
    model, _ = net()
    found = scores("slimming")
    assert torch.allclose(found["stem"], model.norm.weight.abs().double())
    assert found["a"] is None  # it passes none
    bare = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 3))
    with pytest.raises(PruneError, match="nothing to say .* scales of batch norms"):
        score(bare, [g for g in find_groups(bare, SIZE) if g.pinned is None], "slimming", Batches())


def test_near_the_median_is_easily_replaced() -> None:
    model, groups = net()
    with torch.no_grad():
        model.a.weight[:, :, 0, 0] = torch.arange(6.0)[:, None]
    found = score(model, [groups["a"]], "fpgm", Batches())[0]
    assert found.argsort().tolist()[:2] in ([2, 3], [3, 2])
    assert torch.allclose(found[0], torch.tensor(8**0.5 * (1 + 2 + 3 + 4 + 5), dtype=torch.float64))


def slope_of_one_batch(model: Net, images: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """dL/dm by autograd, (B, 6): m multiplies what the readers of `a` are given."""
    m = torch.ones(len(images), 6, requires_grad=True)

    def gate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * m[:, :, None, None],)

    handles = [layer.register_forward_pre_hook(gate) for layer in (model.b, model.c)]
    loss = F.cross_entropy(model(images), labels, reduction=reduction)
    for handle in handles:
        handle.remove()
    return torch.autograd.grad(loss, m)[0].double()


def test_taylor_is_the_slope_of_the_loss_over_all_batches() -> None:
    model, _ = net()
    loader = batches()
    slopes = [slope_of_one_batch(model, *batch, "mean").sum(0).abs() for batch in loader]
    assert torch.allclose(scores("taylor", loader)["a"], torch.stack(slopes).mean(0), rtol=1e-4)
    assert torch.allclose(scores("taylor", loader, count=2)["a"], torch.stack(slopes[:2]).mean(0), rtol=1e-4)


def test_fisher_is_the_square_of_every_samples_slope() -> None:
    model, _ = net()
    loader = batches()
    slopes = torch.cat([slope_of_one_batch(model, *batch, "sum") for batch in loader])
    assert torch.allclose(scores("fisher", loader)["a"], slopes.square().mean(0) / 2, rtol=1e-4)


def test_the_slope_foretells_what_closing_a_unit_does() -> None:
    model, groups = net()
    images, labels = batches(1, 64)[0]
    with torch.no_grad():
        for layer in (model.b, model.c):  # small enough for the first order
            layer.weight[:, 3] *= 0.01
        before = F.cross_entropy(model(images), labels)
        for layer in (model.b, model.c):
            layer.weight[:, 3] = 0
        after = F.cross_entropy(model(images), labels)
        model.b.weight[:, 3], model.c.weight[:, 3] = 0, 0
    fresh, groups = net()
    with torch.no_grad():
        for layer in (fresh.b, fresh.c):
            layer.weight[:, 3] *= 0.01
    found = score(fresh, [groups["a"]], "taylor", Batches([(images, labels)]))[0][3]
    assert found.item() == pytest.approx(abs(float(after - before)), rel=0.05)


def test_the_hessian_of_a_quadratic_is_exact() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    groups = [g for g in find_groups(model, (2, 1, 1)) if g.pinned is None and g.layers("produces")]
    images, labels = torch.randn(64, 2, 1, 1), torch.zeros(64, dtype=torch.int64)
    given = Batches([(images, labels)] * 400, 400, lambda y, _: y.square().sum(1).mean())
    found = score(model, groups, "hessian", given)[0]
    # L = mean |W h|^2, so d2L / dW_ij^2 = 2 E[h_j^2].
    curvature = 2 * model[0](images).flatten(1).square().mean(0)
    expected = (curvature * model[2].weight.square() / 2).sum(0).double()
    assert torch.allclose(found, expected.detach(), rtol=0.2)


def test_activation_is_what_readers_see() -> None:
    model, _ = net()
    loader = batches()
    seen: list[Tensor] = []
    handle = model.b.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for images, _ in loader:
            model(images)
    handle.remove()
    mean = torch.cat(seen).mean((0, 2, 3)).double()
    assert torch.allclose(scores("activation", loader)["a"], 2 * mean, rtol=1e-5)  # two layers read it
    assert torch.allclose(scores("activation", [images for images, _ in loader])["a"], 2 * mean, rtol=1e-5)


def test_random_is_random_and_repeats() -> None:
    assert torch.equal(scores("random", seed=1)["a"], scores("random", seed=1)["a"])
    assert not torch.equal(scores("random", seed=1)["a"], scores("random", seed=2)["a"])


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in {"vit_tiny_patch16_224", "coat_lite_tiny", "swin_tiny_patch4_window7_224"}],
    ids=str,
)
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_criterion_works_on_tokens(case: Case, criterion: str) -> None:
    model = case.backbone()
    for parameter in model.parameters():
        if not parameter.any():  # a classifier that begins at zero, behind which nothing counts
            nn.init.normal_(parameter)
    groups = [g for g in find_groups(model, case.size) if g.pinned is None and g.units > 1 and g.layers("produces")]
    if criterion == "slimming" and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return
    found = score(model, groups, criterion, Batches([(case.images(3), torch.tensor([0, 1, 2]))]))
    assert [s is None or s.shape == (g.units,) for s, g in zip(found, groups, strict=True)]
    # Of two units each is as far from the other.
    assert all(float(s.std()) > 0 for s, g in zip(found, groups, strict=True) if s is not None and g.units > 2)


def test_frozen_weights_are_judged_and_stay_frozen() -> None:
    model, groups = net()
    model.requires_grad_(False)
    expected = scores("taylor", batches())["a"]
    assert torch.allclose(score(model, [groups["a"]], "taylor", Batches(batches()))[0], expected)
    assert bool((score(model, [groups["a"]], "hessian", Batches(batches()))[0] > 0).any())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def empty() -> Iterator[tuple[Tensor, Tensor]]:
    yield from ()


@pytest.mark.parametrize(
    ("criterion", "loader", "error", "message"),
    [
        ("tailor", None, PruneError, "no criterion 'tailor'; did you mean 'taylor'"),
        ("taylor", None, DataError, "looks at labelled images; give a loader"),
        ("activation", empty(), DataError, "gave no batches"),
        ("taylor", [(torch.randn(2, *SIZE), torch.tensor([0, -1]))], DataError, "batch 0 has images without a label"),
        ("fisher", [torch.randn(2, *SIZE)], DataError, "batch 0 has no labels"),
        ("taylor", [(torch.randn(2, *SIZE), torch.zeros(0).long())], DataError, "batch 0 has no labels"),
        (
            "taylor",
            [(torch.randn(2, *SIZE), torch.tensor([0, 99]))],
            DataError,
            "from 0 to 99 .* class numbers below K",
        ),
        ("taylor", [(torch.randn(2, *SIZE), torch.zeros(2))], DataError, r"labels \(2,\) of torch.float32"),
        ("taylor", [{"image": torch.randn(2, *SIZE)}], DataError, r"batch 0 is a dictionary with \['image'\]"),
        ("activation", [torch.randn(0, *SIZE)], DataError, "batch 0 has no images"),
        ("activation", [torch.full((2, *SIZE), np.nan)], NonFiniteError, "'activation' gave NaN .* made by stem"),
    ],
)
def test_bad_input(criterion: str, loader: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scores(criterion, loader)
