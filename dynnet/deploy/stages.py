"""A model in stages: its graph, exported once, cut where exits answer.

What is exported is the plain backbone, with heads and confidence called where exits stand. The graph that comes out is
divided behind each exit's answer. Three kinds of values are made in one part and used in a later one. What comes of the
images crosses the cut, and loses the rows of samples that have left; what does not (tables of positions, masks, a class
token for every sample) is made anew on the other side; and sizes of the batch are asked anew of what came across.

    B batch, b samples that are still here, K classes, E exits; exit number E is the backbone's own head
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from dynnet.deploy.manifest import Port
from dynnet.deploy.whole import Whole
from dynnet.errors import ExportError
from dynnet.exits.boundaries import Feature
from dynnet.model import DynamicModel


@dataclass(frozen=True)
class Stage:
    """What runs between two decisions.

    Attributes:
        graph: from the tensors of `takes` to logits (b, K), confidence (b,), and the tensors of `gives`.
        takes: what it reads; images for the first one.
        gives: what later stages read.
        exit: the number of the exit at its end; E for the backbone's own head.
        answers: does the exit answer, or does only a router stand there?
        route: which of `gives` says how wide a sample goes on, (b, widths) logits; None where nobody asks.
    """

    graph: fx.GraphModule
    takes: tuple[Port, ...]
    gives: tuple[Port, ...]
    exit: int
    answers: bool = True
    route: str | None = None


@torch.no_grad()
def staged(
    model: DynamicModel, size: Sequence[int], routers: Mapping[int, tuple[nn.Module, Feature]] | None = None
) -> list[Stage]:
    """The stages of a model whose exits are on.

    Args:
        model: in eval mode; left as it is.
        size: (C, H, W) of the images.
        routers: as for `Whole`.

    Raises:
        ExportError: `torch.export` cannot take the model, or what crosses a cut cannot be told sample by sample.
    """
    whole = Whole(model, routers)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    images = torch.randn(3, *size, dtype=weight.dtype, device=weight.device)  # one would be taken for a constant
    whole(images)  # what is made once and kept (tables, lists of channels) is made of numbers, not while it is traced
    try:
        program = torch.export.export(whole, (images,), dynamic_shapes=({0: Dim("b", min=1)},), strict=False)
        program = program.run_decompositions({})  # nothing in place
    except Exception as error:  # of torch's, or of the model's own code
        raise ExportError(
            f"torch.export cannot take the model: {type(error).__name__}: {_first_lines(error)}"
        ) from error
    return _Cutter(program).stages(whole.exits, whole.on, list(whole.routers))


class _Cutter:
    """Divides the graph of a program."""

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        self.program = program
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self.held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.held |= signature.inputs_to_lifted_tensor_constants
        (self.images,) = (n for n in program.graph.nodes if n.op == "placeholder" and n.name not in self.held)
        self.batch = self.images.meta["val"].shape[0].node.expr
        self.from_images = {self.images}
        for node in self.nodes:
            if _is_tensors(node) and any(arg in self.from_images for arg in node.all_input_nodes):
                self.from_images.add(node)

    def stages(self, exits: Sequence[int], on: Sequence[int], routed: Sequence[int]) -> list[Stage]:
        """One for each exit, in order.

        Args:
            exits: their numbers,
            on: of those that answer, but for the end,
            routed: of those where routers stand.
        """
        (answers,) = next(n for n in self.program.graph.nodes if n.op == "output").args
        pairs = [tuple(answers[2 * i : 2 * i + 2]) for i in range(len(exits))]
        routes = dict(zip(routed, answers[2 * len(exits) :], strict=True))
        place = {node: i for i, node in enumerate(self.nodes)}
        ends = [
            max(place.get(node, -1) for node in (*pair, *([routes[exit]] if exit in routes else [])))
            for exit, pair in zip(exits, pairs, strict=True)
        ]
        self.stage = {self.images: 0}
        for node, i in place.items():
            inside = next((number for number, end in enumerate(ends) if i <= end), len(ends) - 1)
            # What is one of several outputs is taken out where they are made: a list cannot cross.
            self.stage[node] = self.stage[node.args[0]] if node.target is operator.getitem else inside
        reads = [self._reads(number, pair) for number, pair in enumerate(pairs)]
        stages = []
        for number, (exit, pair) in enumerate(zip(exits, pairs, strict=True)):
            later = {node for read in reads[number + 1 :] for node in read}
            # Images are there already, for whoever takes them later, as a cascade does.
            gives = [n for n in self.from_images if n in later and self.stage[n] == number and n is not self.images]
            gives.sort(key=lambda node: place.get(node, -1))
            if exit in routes:
                gives = [node for node in gives if node is not routes[exit]] + [routes[exit]]
            stage = self._stage(number, exit, reads[number], [*pair, *gives])
            route = stage.gives[-1].name if exit in routes else None
            stages.append(replace(stage, answers=exit in on or exit == exits[-1], route=route))
        return stages

    def _reads(self, number: int, answers: Sequence[fx.Node]) -> list[fx.Node]:
        """What comes of the images and is made before a stage that reads it."""
        if number == 0:
            return [self.images]
        inside = [node for node in self.nodes if self.stage[node] == number and node in self.from_images]
        used = dict.fromkeys(arg for node in inside for arg in node.all_input_nodes) | dict.fromkeys(answers)
        return [node for node in used if node in self.from_images and self.stage[node] < number]

    def _stage(self, number: int, exit: int, takes: Sequence[fx.Node], gives: Sequence[fx.Node]) -> Stage:
        graph, root = fx.Graph(), nn.Module()
        made: dict[fx.Node, Any] = {}
        values = tuple(self._value(node) for node in takes)
        for node, value in zip(takes, values, strict=True):
            made[node] = graph.placeholder(value.name)
        size = self._batch_size(graph, made[takes[0]], values[0])

        def bring(node: Any) -> Any:
            """A node of the whole graph in this one."""
            if node in made:
                return made[node]
            if node.name in self.held:
                made[node] = _attribute(graph, root, self._tensor(node.name), f"held_{len(made)}")
            elif node.target is torch.ops.aten.sym_size.int:
                factor = self._factor(node.meta["val"])
                made[node] = size() if factor == 1 else graph.call_function(operator.mul, (size(), factor))
            else:
                args, kwargs = (fx.node.map_arg(given, bring) for given in (node.args, node.kwargs))
                # What was a view of a tensor as the model lays it out need be none of one as an engine hands it on.
                viewed = node.target is torch.ops.aten.view.default
                target = torch.ops.aten.reshape.default if viewed else node.target
                made[node] = graph.call_function(target, args, kwargs)
            made[node].meta = dict(node.meta) if isinstance(made[node], fx.Node) else {}
            return made[node]

        for node in self.nodes:
            if self.stage[node] == number and node in self.from_images:
                bring(node)
        graph.output(tuple(bring(node) for node in gives))
        module = fx.GraphModule(root, graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return Stage(module, values, tuple(self._value(node) for node in gives[2:]), exit)

    def _batch_size(self, graph: fx.Graph, taken: fx.Node, value: Port) -> Any:
        """Makes the node of the number of samples, once."""
        found: list[fx.Node] = []

        def size() -> fx.Node:
            if not found:
                length = graph.call_function(torch.ops.aten.sym_size.int, (taken, value.dim))
                each = value.per_sample
                found.append(length if each == 1 else graph.call_function(operator.floordiv, (length, each)))
            return found[0]

        return size

    def _value(self, node: fx.Node) -> Port:
        shape = node.meta["val"].shape
        dims = [dim for dim, length in enumerate(shape) if not isinstance(length, int)]
        if len(dims) != 1:
            raise ExportError(
                f"{node.name}, of shape {tuple(map(str, shape))}, goes on behind an exit, and has "
                f"{len(dims) or 'no'} dimensions of the batch: samples cannot leave it one by one; choose other exits"
            )
        # Whoever writes a stage for an engine gives what is inside of it names like the whole graph's.
        name = "images" if node is self.images else f"cut_{node.name}"
        return Port(name, dims[0], self._factor(shape[dims[0]]))

    def _factor(self, length: Any) -> int:
        """How many times the number of samples it is."""
        if isinstance(length, int):
            raise ExportError(f"a size of the batch, {length}, is a constant of the graph")
        factor = length.node.expr / self.batch
        if not factor.is_Integer:
            raise ExportError(f"a size of {length.node.expr} is no multiple of the batch {self.batch}")
        return int(factor)

    def _tensor(self, name: str) -> Tensor:
        held = self.held[name]
        tensor = self.program.state_dict.get(held, self.program.constants.get(held))
        assert isinstance(tensor, Tensor), held
        return tensor.detach()


def _is_tensors(node: fx.Node) -> bool:
    """Does it make a tensor, or several?"""
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value))


def _attribute(graph: fx.Graph, root: nn.Module, tensor: Tensor, name: str) -> fx.Node:
    root.register_buffer(name, tensor)
    return graph.get_attr(name)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:3])[:300]
