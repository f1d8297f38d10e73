"""A dry run of a model: what its modules give and cost, and which tensors are alive between them.

The run happens on the meta device: shapes without numbers, so it is quick and needs no memory, whatever the model's
size. Two readings come from it:

- the MACs of every op, booked on the module in which it ran (batch 1, the sample run alone);
- the life of every tensor, from the op that made it to the last op that read it. A module's output carries the whole
  state where nothing else that is alive at its end belongs to the batch. Rows can leave there.

    B batch; "leaves" are the tensors of a nested output, in the order of torch's pytree
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dynnet.backbone.meta import run_on_meta

# A batch size that is no channel count, no resolution and no divisor of either: a dimension that is a multiple of it
# belongs to the batch. The dry run has no numbers, so a large batch costs nothing.
BATCH = 1009

aten = torch.ops.aten

# Ops that multiply and add, but whose price nobody has told. They are named in a bill, never counted as zero.
_UNPRICED = {
    aten.mv, aten.dot, aten.vdot, aten.addmv, aten.addbmm, aten.addr, aten.ger,
    aten._fft_r2c, aten._fft_c2r, aten._fft_c2c,
    aten.grid_sampler_2d, aten.grid_sampler_3d, aten._native_multi_head_attention,
    aten.lstm, aten.gru, aten.mkldnn_rnn_layer, aten._trilinear, aten._cdist_forward,
    aten._embedding_bag, aten.embedding_bag, aten._convolution_mode, aten._thnn_fused_lstm_cell,
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """One tensor.

    Attributes:
        shape: at batch `BATCH`.
        batch_dim: the dimension of the batch; None where it has none.
        per_sample: entries of that dimension that belong to one sample; more than 1 where windows or patches are
            folded into the batch, sample by sample.
        floating: is it of a floating-point type?
    """

    shape: tuple[int, ...]
    batch_dim: int | None
    per_sample: int
    floating: bool


@dataclass(frozen=True)
class Call:
    """One call of one module.

    Attributes:
        name: the module's, as in `named_modules()`.
        begin, end: the clock, in ops since the start of the forward.
        macs: MACs done by the whole forward when the call returned, per `BATCH` samples.
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
        macs: of the whole forward.
        layers: MACs by the module in which the op ran ("" is the model itself).
        unpriced: ops that do arithmetic of unknown price, with the modules in which they ran.
        lives: of the tensors that belong to the batch, by identity.
        output: leaves of what the model returned.
    """

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
        found: dict[int, set[int]] = {}
        for tensor in self.beside(call):
            for clock, reader in self.lives[tensor].readers:
                if clock <= call.end:
                    continue
                outermost = -1
                while reader >= 0 and self.calls[reader].begin >= call.end:
                    if tensor in self.calls[reader].inputs.values():
                        outermost = reader
                    reader = self.calls[reader].within
                if outermost < 0:
                    return None
                found.setdefault(outermost, set()).add(tensor)
        return found


def trace(
    model: nn.Module, input_size: tuple[int, ...], batch: int, forward: Callable[[Tensor], Any] | None = None
) -> Trace:
    """Run `model` once on the meta device, in eval mode, and put everything back as it was.

    Args:
        model: any module that takes one (B, *input_size) tensor.
        input_size: (C, H, W).
        batch: rows of the input.
        forward: what to call instead of the model itself, with the input.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    recorder = _Recorder(batch)
    names = {name: module for name, module in model.named_modules() if name}
    with on_meta(model), evaluating(model), torch.no_grad(), watching(names, recorder.enter, recorder.leave):
        images = torch.empty(batch, *input_size, dtype=dtype, device="meta")
        with recorder:
            output = (forward or model)(images)
    return recorder.finish(output)


class _Recorder(TorchDispatchMode):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.result = Trace()
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
        dims = [d for d, size in enumerate(x.shape) if size and size % self.batch == 0] if self.batch > 1 else []
        per_sample = x.shape[dims[0]] // self.batch if dims else 1
        return Leaf(tuple(x.shape), dims[0] if dims else None, per_sample, x.is_floating_point())

    def _see(self, x: Tensor) -> int:
        if id(x) not in self.lives:
            self.tensors.append(x)
            self.lives[id(x)] = Life(self.clock, self._leaf(x))
        return id(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = run_on_meta(func, args, kwargs)
        self.clock += 1
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.lives[self._see(x)].readers.append((self.clock, self.stack[-1] if self.stack else -1))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._see(x)
        packet = func._overloadpacket
        if packet in flop_registry:
            # FLOPs are counted as two per multiply-add.
            macs = flop_registry[packet](*args, **kwargs, out_val=output) // 2
            self.result.macs += macs
            self.result.layers[self.names[-1]] += macs
        elif packet in _UNPRICED or func.namespace not in ("aten", "prims", "prim"):
            self.result.unpriced.setdefault(str(packet), set()).add(self.names[-1])
        return output

    def finish(self, output: Any) -> Trace:
        leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        for x in leaves:
            self.lives[self._see(x)].readers.append((self.clock + 1, -1))
        self.result.output = tuple(self._leaf(x) for x in leaves)
        self.result.lives = {t: life for t, life in self.lives.items() if life.leaf.batch_dim is not None}
        return self.result


@contextlib.contextmanager
def watching(
    modules: Mapping[str, nn.Module], enter: Callable[[str], Any], leave: Callable[[str], Any]
) -> Iterator[None]:
    """Hooks on modules, by name, for as long as this lasts.

    Args:
        modules: by name.
        enter: makes the hook (module, args, kwargs) that runs before a module's own ones.
        leave: makes the hook (module, args, output) that runs after them.
    """
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def reading(layers: Mapping[str, nn.Module], look: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Show `look` the name and the input of each of these layers as it runs, for as long as this lasts; what it returns
    is read in the input's place."""

    def hook(name: str) -> Any:
        def show(module: nn.Module, args: Any) -> Any:
            x = look(name, args[0])
            return None if x is None else (x, *args[1:])

        return show

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(hook(name)))
        yield


@contextlib.contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """All tensors of a model replaced by meta tensors of the same shape and type, and put back on leaving. No inference
    mode, in which operators are not dispatched one by one.

    Each slot is replaced once, also where modules or parameters are shared (torch.func.functional_call is confused by
    shared modules), and tensors kept as plain attributes are replaced as well.
    """
    replaced: list[tuple[Any, str, Tensor]] = []
    twins: dict[int, Tensor] = {}
    with torch.inference_mode(False):
        try:
            for module in model.modules():
                for slots in cast(list[dict[str, Any]], [module._parameters, module._buffers, module.__dict__]):
                    for key, value in slots.items():
                        if not isinstance(value, Tensor) or value.device.type == "meta":
                            continue
                        if id(value) not in twins:
                            twins[id(value)] = _without_numbers(value)
                        replaced.append((slots, key, value))
                        slots[key] = twins[id(value)]
            yield
        finally:
            for slots, key, value in replaced:
                slots[key] = value


def _without_numbers(tensor: Tensor) -> Tensor:
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; in int8 it may have no parameters."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every module in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
