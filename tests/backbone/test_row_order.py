"""How samples lie in what operators make: told by a dry run, and seen in real numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynnet.backbone.row_order import Orders

B = 7  # no other size of these tensors is a multiple of it

WAYS: dict[str, Callable[[Tensor], Tensor]] = {  # of (B, 4, 6)
    "as it is": lambda x: x,
    "pieces side by side": lambda x: x.flatten(0, 1),
    "samples inside": lambda x: x.transpose(0, 1).flatten(0, 1),
    "windows": lambda x: x.view(B, 2, 2, 6).permute(0, 2, 1, 3).reshape(-1, 2, 6),
    "windows, samples in the middle": lambda x: x.view(B, 2, 2, 6).permute(1, 0, 2, 3).flatten(0, 2),
    "and back": lambda x: x.transpose(0, 1).flatten(0, 1).unflatten(0, (4, B)).transpose(0, 1).flatten(0, 1),
    "twice": lambda x: torch.cat([x, x + 0]),
    "the first of two": lambda x: torch.cat([x, x + 0]).chunk(2)[0],
    "repeated": lambda x: x.repeat(3, 1, 1),
    "along another dimension": lambda x: torch.cat([x, x], 1).flip(1).roll(1, 2),
    "last": lambda x: x.permute(1, 2, 0).flatten(0, 1),
    "computed": lambda x: (x.flatten(0, 1) @ torch.ones(6, 5, device=x.device)).relu().sum(1),
    "chosen elsewhere": lambda x: x[:, torch.tensor([2, 0], device=x.device)].flatten(0, 1),
}
UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, 0),
    "every second": lambda x: torch.cat([x, x + 0])[::2],
    "from the middle": lambda x: torch.cat([x, x + 0])[3 : 3 + B],
    "gathered": lambda x: x.gather(0, torch.zeros(B, 4, 6, dtype=torch.long, device=x.device)),
    "chosen": lambda x: x[torch.arange(B - 1, -1, -1, device=x.device)],
    "two batches of different pieces": lambda x: torch.cat([x.flatten(0, 1), x.mean(1)]),
}


class Following(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.orders = Orders(B)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.orders.follow(func._overloadpacket, args, kwargs or {}, output)
        return output


def followed(way: Callable[[Tensor], Tensor]) -> tuple[Tensor, Orders]:
    with Following() as mode:
        return way(torch.empty(B, 4, 6, device="meta")), mode.orders


@pytest.mark.parametrize("name", WAYS)
def test_the_order_is_what_numbers_show(name: str) -> None:
    made, orders = followed(WAYS[name])
    order = orders.of(made)
    assert order is not None
    number = WAYS[name](torch.arange(B).float().view(B, 1, 1).expand(B, 4, 6).contiguous())
    if name == "computed":
        number = number / number[-1] * (B - 1)
    along = number.movedim(order.dim, 0)
    seen = along.reshape(len(along), -1)[:, 0].round().long()
    neighbours = len(seen) // (B * order.repeats)
    assert seen.tolist() == torch.arange(B).repeat_interleave(neighbours).repeat(order.repeats).tolist()


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_nobody_can_tell_is_not_told(name: str) -> None:
    made, orders = followed(UNKNOWN[name])
    assert orders.of(made) is None


def test_an_operator_in_place_that_moves_dimensions_is_noticed() -> None:
    with Following() as mode:
        x = torch.empty(B, 4, 6, device="meta")
        x += 1
        x.transpose_(0, 1)
    assert mode.orders.of(x) is None
