"""A dry run of a model: what its modules give and cost, and which tensors are alive between them.

The run happens on the meta device: shapes without numbers, so it is quick and needs no memory, whatever the model's
size. Two readings come from it:

- the MACs of every op, booked on the module in which it ran (batch 1, the sample run alone);
- the life of every tensor, from the op that made it to the last op that read it. A module's output carries the whole
  state where nothing else that is alive at its end belongs to the batch. Rows can leave there.

    B batch; "leaves" are the tensors of a nested output, in the order of torch's pytree
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynnet.backbone.counting import macs_of
from dynnet.backbone.hooks import watching
from dynnet.backbone.keeping import unaltered
from dynnet.backbone.meta import run_on_meta
from dynnet.backbone.modes import evaluating, somebodys_forward
from dynnet.backbone.owners import Owners
from dynnet.backbone.row_order import Orders
from dynnet.backbone.twin import meta_twin

# A batch size that is no channel count, no resolution and no divisor of either: a dimension that is a multiple of it
# belongs to the batch. The dry run has no numbers, so a large batch costs nothing.
BATCH = 1009

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Leaf:
    """One tensor.

    Attributes:
        shape: at batch `BATCH`.
        batch_dim: the dimension of the batch; None where it has none.
        per_sample: entries of that dimension that belong to one sample; more than 1 where windows or patches are
            folded into the batch.
        floating: is it of a floating-point type?
        together: are a sample's entries neighbours? Not where samples are folded inside, patch by patch, nor where
            nobody can tell (`dynnet.backbone.row_order`).
    """

    shape: tuple[int, ...]
    batch_dim: int | None
    per_sample: int
    floating: bool
    together: bool = True


@dataclass(frozen=True)
class Call:
    """One call of one module.

    Attributes:
        name: the module's, as in `named_modules()`.
        begin, end: the clock, in ops since the start of the forward.
        macs: MACs done by the whole forward when the call returned, for one sample.
        leaves: the tensors of the output.
        outputs: their identities.
        inputs: identities of the tensor leaves of (args, kwargs), by position.
        within: index of the calling call, -1 at the top.
    """

    name: str
    begin: int
    end: int
    macs: int
    leaves: tuple[Leaf, ...]
    outputs: tuple[int, ...]
    inputs: dict[int, int]
    within: int


@dataclass
class Life:
    """One tensor: the clock at which it was made, and its readers as (clock, index of the innermost call, -1: none)."""

    made: int
    leaf: Leaf
    readers: list[tuple[int, int]] = field(default_factory=list)

    @property
    def last_read(self) -> int:
        return self.readers[-1][0] if self.readers else self.made


@dataclass
class Trace:
    """What one dry run saw.

    Attributes:
        calls: in the order in which they began.
        macs: of the whole forward, for one sample; what is done once for a batch counts whole.
        layers: MACs by the module in which the op ran ("" is the model itself).
        unpriced: ops that do arithmetic of unknown price, with the modules in which they ran.
        lives: of the tensors that belong to the batch, by identity.
        output: leaves of what the model returned.
        owners: of the model's tensors, and who has read them.
    """

    owners: Owners
    calls: list[Call] = field(default_factory=list)
    macs: int = 0
    layers: Counter[str] = field(default_factory=Counter)
    unpriced: dict[str, set[str]] = field(default_factory=dict)
    lives: dict[int, Life] = field(default_factory=dict)
    output: tuple[Leaf, ...] = ()

    def once(self) -> dict[str, Call]:
        """The modules that were called exactly once."""
        count = Counter(call.name for call in self.calls)
        return {call.name: call for call in self.calls if count[call.name] == 1}

    def with_readers(self, calls: Sequence[Call]) -> Trace:
        """The same trace, had somebody else read the outputs of these calls as well (exit heads do)."""
        lives = dict(self.lives)
        for call in calls:
            for tensor in call.outputs:
                if tensor in lives:
                    life = lives[tensor]
                    reader = (call.end, self.calls.index(call))
                    lives[tensor] = replace(life, readers=sorted([*life.readers, reader]))
        return replace(self, lives=lives)

    def beside(self, call: Call) -> set[int]:
        """Tensors of the batch that outlive `call` but are no part of its output."""
        crossing = {t for t, life in self.lives.items() if life.made <= call.end < life.last_read}
        return crossing - set(call.outputs)

    def receivers(self, call: Call) -> dict[int, set[int]] | None:
        """The calls after `call` that are handed a tensor from `beside`: their indices, and which tensors.

        Only the outermost, which hand it on. None where an op outside any such call reads one of the tensors: there
        nobody can thin it out.
        """
        receivers: dict[int, set[int]] = {}
        for tensor in self.beside(call):
            for clock, reader in self.lives[tensor].readers:
                if clock <= call.end:
                    continue
                outermost = self._outermost(reader, tensor, call.end)
                if outermost is None:
                    return None
                receivers.setdefault(outermost, set()).add(tensor)
        return receivers

    def _outermost(self, reader: int, tensor: int, begin: int) -> int | None:
        """Of the calls around a reader that began no earlier, the outermost that was handed the tensor."""
        outermost = None
        while reader >= 0 and self.calls[reader].begin >= begin:
            if tensor in self.calls[reader].inputs.values():
                outermost = reader
            reader = self.calls[reader].within
        return outermost


def trace(
    model: M, input_size: tuple[int, ...], batch: int, forward: Callable[[M, Tensor], Any] | None = None
) -> Trace:
    """Run a model's twin once on the meta device, in eval mode; the model itself is left alone.

    Args:
        model: any module that takes one (B, *input_size) tensor; a twin from `meta_twin` is not copied again.
        input_size: (C, H, W).
        batch: rows of the input.
        forward: what to call instead of the model itself, with its twin and the input.

    Raises:
        ForwardError: what the forward raised.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    twin = meta_twin(model)
    recorder = _Recorder(batch, Owners(twin))
    names = {name: module for name, module in twin.named_modules() if name}
    with unaltered(twin), torch.inference_mode(False), evaluating(twin), torch.no_grad():
        images = torch.empty(batch, *input_size, dtype=dtype, device="meta")
        with watching(names, recorder.enter, recorder.leave), recorder, somebodys_forward(model):
            output = twin(images) if forward is None else forward(twin, images)
    return recorder.finish(output)


class _Recorder(TorchDispatchMode):
    def __init__(self, batch: int, owners: Owners) -> None:
        super().__init__()
        self.batch = batch
        self.orders = Orders(batch)
        self.result = Trace(owners)
        self.clock = 0
        self.stack: list[int] = []  # indices into result.calls
        self.names: list[str] = [""]
        # Held until the end: an identity may not be used twice.
        self.tensors: list[Tensor] = []
        self.lives: dict[int, Life] = {}

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = {
                i: self._see(x) for i, x in enumerate(y for y in tree_leaves((args, kwargs)) if isinstance(y, Tensor))
            }
            within = self.stack[-1] if self.stack else -1
            self.stack.append(len(self.result.calls))
            self.names.append(name)
            self.result.calls.append(Call(name, self.clock, -1, 0, (), (), inputs, within))

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            index = self.stack.pop()
            self.names.pop()
            begun = self.result.calls[index]
            leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            self.result.calls[index] = Call(
                begun.name,
                begun.begin,
                self.clock,
                self.result.macs,
                tuple(self._leaf(x) for x in leaves),
                tuple(self._see(x) for x in leaves),
                begun.inputs,
                begun.within,
            )

        return hook

    def _leaf(self, x: Tensor) -> Leaf:
        dim = self.orders.dim(x) if self.batch > 1 else None
        if dim is None:
            return Leaf(tuple(x.shape), None, 1, x.is_floating_point())
        order = self.orders.of(x)
        dim = dim if order is None else order.dim
        together = order is not None and order.repeats == 1
        return Leaf(tuple(x.shape), dim, x.shape[dim] // self.batch, x.is_floating_point(), together)

    def _see(self, x: Tensor) -> int:
        if id(x) not in self.lives:
            self.tensors.append(x)
            self.lives[id(x)] = Life(self.clock, self._leaf(x))
        return id(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = run_on_meta(func, args, kwargs)
        self.clock += 1
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.result.owners.see(inputs, self.names)
        for x in inputs:
            self.lives[self._see(x)].readers.append((self.clock, self.stack[-1] if self.stack else -1))
        if self.batch > 1:
            self.orders.follow(func._overloadpacket, args, kwargs, output)
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._see(x)
        self._count(func, args, kwargs, output, inputs)
        return output

    def _count(self, func: Any, args: Any, kwargs: Any, output: Any, inputs: Sequence[Tensor]) -> None:
        macs = macs_of(func, args, kwargs, output)
        if macs is None:
            self.result.unpriced.setdefault(str(func._overloadpacket), set()).add(self.names[-1])
        elif macs:
            if any(self.orders.dim(x) is not None for x in inputs):
                macs //= self.batch
            self.result.macs += macs
            self.result.layers[self.names[-1]] += macs

    def finish(self, output: Any) -> Trace:
        leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        for x in leaves:
            self.lives[self._see(x)].readers.append((self.clock + 1, -1))
        self.result.output = tuple(self._leaf(x) for x in leaves)
        self.result.lives = {t: life for t, life in self.lives.items() if life.leaf.batch_dim is not None}
        return self.result
