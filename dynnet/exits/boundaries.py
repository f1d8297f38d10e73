"""Where exits can stand: boundaries of a backbone, found by a dry run.

A boundary is a module whose output carries the whole state of the forward, batch first, so that rows taken out of it
are gone from all that follows. Tensors prepared earlier that are handed on beside it (position tables, masks, the
previous cell of a NASNet) are its *companions*: they lose the same rows when a later module receives them.

    B batch, C channels, E exits
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import nn

from dynnet.backbone.dry_run import BATCH, Call, Trace, trace
from dynnet.backbone.input_size import first_run
from dynnet.backbone.names import title
from dynnet.backbone.twin import meta_twin
from dynnet.errors import ExitError, did_you_mean

# No exit is proposed after this share of the MACs: it could save next to nothing.
_LATEST = 0.95

# Where clean boundaries leave a longer stretch of MACs than this, places with companions are proposed as well.
_WIDEST_GAP = 0.7

Layout = Literal["nchw", "nhwc", "tokens", "vector"]


@dataclass(frozen=True)
class Feature:
    """One floating-point tensor of a boundary's output.

    Attributes:
        leaf: its position among the tensors of the output.
        shape: without the batch.
        layout: "nchw" (C, H, W), "nhwc" (H, W, C), "tokens" (N, C) or "vector" (C,).
        prefix: leading tokens that are no image patches (class token, registers).
        image: (H, W) of the images, or any numbers of their ratio, by which tokens lie in rows.
    """

    leaf: int
    shape: tuple[int, ...]
    layout: Layout
    prefix: int = 0
    image: tuple[int, int] = (1, 1)

    @property
    def channels(self) -> int:
        return self.shape[0] if self.layout in ("nchw", "vector") else self.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of a map, or of tokens as they lie in rows; (1, 1) where nobody can tell."""
        if self.layout == "nchw":
            return self.shape[1], self.shape[2]
        if self.layout == "nhwc":
            return self.shape[0], self.shape[1]
        if self.layout == "tokens":
            return grid_of(self.shape[0] - self.prefix, self.image) or (1, 1)
        return 1, 1


def grid_of(tokens: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """(H, W) of tokens that stand for equal squares of an image, row by row; None where so many cannot.

    Args:
        tokens: how many.
        image: (H, W) in pixels, or any numbers of this ratio: a last square may be cut off, or filled up.
    """
    height = math.sqrt(tokens * image[0] / image[1])
    rows = [n for n in range(max(1, int(height) - 1), int(height) + 3) if tokens % n == 0]
    grids = [grid for n in rows if _fits(grid := (n, tokens // n), image)]
    return min(grids, key=lambda grid: abs(grid[0] - height), default=None)


def _fits(grid: tuple[int, int], image: tuple[int, int]) -> bool:
    """Is there a side of squares of which so many fit into both sides of the image, or cover them?"""
    cut = [(length / (n + 1), length / n) for n, length in zip(grid, image, strict=True)]
    filled = [(length / n, length / (n - 1) if n > 1 else math.inf) for n, length in zip(grid, image, strict=True)]
    return any(max(low for low, _ in sides) < min(high for _, high in sides) for sides in (cut, filled))


@dataclass(frozen=True)
class Boundary:
    """A place for an exit.

    Attributes:
        name: the module, as in `named_modules()`.
        leaves: the batch's tensors among the leaves of the output, as (position, entries per sample).
        features: what a head may read.
        macs_share: of the backbone's MACs that are spent when the module is done, in (0, 1).
    """

    name: str
    leaves: tuple[tuple[int, int], ...]
    features: tuple[Feature, ...]
    macs_share: float


@dataclass(frozen=True)
class Companion:
    """Batch tensors that a module receives beside the state.

    Attributes:
        name: the receiving module.
        leaves: (position among the leaves of (args, kwargs), dimension of the batch, entries per sample).
        together: are the entries of a sample neighbours in all of them?
    """

    name: str
    leaves: tuple[tuple[int, int, int], ...]
    together: bool


class Places:
    """All that a dry run tells about exits in one backbone.

    Attributes:
        twin: the backbone without numbers.
        trace: what the dry run saw.
        candidates: boundaries worth proposing, in running order.
        num_classes: K.

    Args:
        backbone: a timm model, or any module from (B, C, H, W) images to (B, K) logits.
        input_size: (C, H, W) of the images.

    Raises:
        ExitError: the backbone cannot be run, or does not answer with (B, K) logits.
    """

    def __init__(self, backbone: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.backbone, self.input_size = backbone, input_size
        with first_run(backbone, input_size, ExitError):
            self.twin = meta_twin(backbone)
            self.trace: Trace = trace(self.twin, input_size, BATCH)
        output = self.trace.output
        if len(output) != 1 or len(output[0].shape) != 2 or output[0].batch_dim != 0:
            raise ExitError(
                f"{title(backbone)} answers with {[leaf.shape for leaf in output]}, where one tensor of (B, K) logits "
                f"is needed; wrap a classifier, with its pooling and its head"
            )
        if getattr(backbone, "num_classes", None) == 0:
            raise ExitError(
                f"{title(backbone)} has no classifier (num_classes=0); create it with num_classes=K, or call "
                f"reset_classifier(K) first"
            )
        self.num_classes = output[0].shape[1]
        self._calls = self.trace.once()
        prefix = getattr(backbone, "num_prefix_tokens", 0)
        self.prefix = prefix if isinstance(prefix, int) else 0
        self.output_fmt = str(getattr(backbone, "output_fmt", "NCHW"))
        self.candidates: list[Boundary] = self._candidates()

    @property
    def last_grid(self) -> int:
        """Pixels a side of the last maps; 1 where there are none."""
        grids = [min(f.grid) for b in self.candidates for f in b.features if f.layout != "vector"]
        return min(grids, default=1)

    def end(self, boundary: Boundary) -> int:
        """The clock at which a boundary is done."""
        return self._calls[boundary.name].end

    def among(self, candidates: Sequence[Boundary]) -> Places:
        """The same dry run, with only these boundaries to propose."""
        narrowed = copy.copy(self)
        narrowed.candidates = list(candidates)
        return narrowed

    def boundary(self, name: str) -> Boundary:
        """The boundary at a module of this name.

        Raises:
            ExitError: there is no such module, or its output cannot be one.
        """
        call = self._calls.get(name)
        valid = ", ".join(b.name for b in self.candidates)
        where = f"in {title(self.backbone)}; choose from {valid}"
        if call is None:
            modules = dict(self.backbone.named_modules())
            if name not in modules:
                hint = did_you_mean(name, [b.name for b in self.candidates])
                raise ExitError(f"no boundary {name!r} {where}{hint}")
            times = sum(c.name == name for c in self.trace.calls)
            raise ExitError(f"module {name!r} runs {times} times in a forward, a boundary must run once, {where}")
        if not _batch_first(call):
            shapes = [leaf.shape for leaf in call.leaves]
            raise ExitError(f"the output of {name!r} is not batch first (shapes {shapes} at batch {BATCH}) {where}")
        boundary = self._boundary(call)
        if not boundary.features:
            raise ExitError(f"the output of {name!r} holds no floating-point features {where}")
        if not 0 < boundary.macs_share < 1:
            raise ExitError(
                f"{name!r} ends when {boundary.macs_share:.0%} of the MACs are spent, an exit must save some {where}"
            )
        return boundary

    def companions(self, exits: Sequence[Boundary]) -> list[Companion]:
        """Modules after an exit that receive batch tensors which no earlier module could thin out."""
        received: dict[str, dict[tuple[int, int, int], bool]] = {}
        # A head reads all that its boundary gives, also what is only handed through and never used again (CoaT).
        trace = self.trace.with_readers([self._calls[boundary.name] for boundary in exits])
        for boundary in exits:
            for index, tensors in (trace.receivers(self._calls[boundary.name]) or {}).items():
                call = self.trace.calls[index]
                for position, tensor in call.inputs.items():
                    leaf = self.trace.lives[tensor].leaf if tensor in tensors else None
                    if leaf is not None and leaf.batch_dim is not None:
                        place = (position, leaf.batch_dim, leaf.per_sample)
                        received.setdefault(call.name, {})[place] = leaf.together
        return [Companion(name, tuple(sorted(leaves)), all(leaves.values())) for name, leaves in received.items()]

    def _candidates(self) -> list[Boundary]:
        """Boundaries worth proposing: whole blocks and stages rather than single layers within a block."""
        clean = self._outermost({n: c for n, c in self._calls.items() if not self.trace.beside(c)})
        shares = [0.0, *(b.macs_share for b in clean), 1.0]
        if max(b - a for a, b in pairwise(shares)) <= _WIDEST_GAP:
            return clean
        # Cells with two inputs (NASNet): no place is clean, but rows can leave with the help of companions.
        return self._outermost({n: c for n, c in self._calls.items() if self.trace.receivers(c) is not None})

    def _outermost(self, calls: dict[str, Call]) -> list[Boundary]:
        best: dict[int, Call] = {}
        for call in calls.values():
            share = call.macs / max(self.trace.macs, 1)
            if not 0 < share <= _LATEST or not _batch_first(call):
                continue
            if not self._boundary(call).features or not self._on_the_spine(call.name, calls):
                continue
            # Of all that end after the same MACs, the outermost; of those, the last (after norm and activation).
            rival = best.get(call.macs)
            if rival is None or (-call.name.count("."), call.end) > (-rival.name.count("."), rival.end):
                best[call.macs] = call
        return [self._boundary(call) for call in sorted(best.values(), key=lambda c: c.end)]

    def _on_the_spine(self, name: str, calls: dict[str, Call]) -> bool:
        """Is every module around it a container of blocks (a list, or a stage that holds a list), not a block?"""
        parts = name.split(".")
        for depth in range(1, len(parts)):
            around = ".".join(parts[:depth])
            module = self.backbone.get_submodule(around)
            if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                continue
            alike = len({type(child) for child in module.children()}) == 1  # RegNet's stages hold b1, b2, ...
            lists = [k for k, m in module.named_children() if isinstance(m, (nn.Sequential, nn.ModuleList))]
            if not alike and not any(n.startswith(f"{around}.{key}.") for key in lists for n in calls):
                return False
        return True

    def _boundary(self, call: Call) -> Boundary:
        features = tuple(
            Feature(i, shape, layout, self._prefix(shape[0]) if layout == "tokens" else 0, self.input_size[1:])
            for i, leaf in enumerate(call.leaves)
            if leaf.floating and leaf.batch_dim == 0 and leaf.per_sample == 1
            for shape in [leaf.shape[1:]]
            for layout in [self._layout(shape)]
            if layout is not None
        )
        leaves = tuple((i, leaf.per_sample) for i, leaf in enumerate(call.leaves) if leaf.batch_dim == 0)
        return Boundary(call.name, leaves, features, call.macs / max(self.trace.macs, 1))

    def _prefix(self, tokens: int) -> int:
        """Leading tokens that are no patches: the host's word if it fits, else one if the others lie in rows then."""
        if 0 < self.prefix < tokens:
            return self.prefix
        whole, without_first = (tokens > n and grid_of(tokens - n, self.input_size[1:]) for n in (0, 1))
        return 1 if without_first and not whole else 0

    def _layout(self, shape: tuple[int, ...]) -> Layout | None:
        if len(shape) == 1:
            return "vector"
        if len(shape) == 2:
            return "tokens"
        if len(shape) != 3:
            return None
        # The images' ratio tells the channels apart; where that does not help, the host is asked.
        channels_last, channels_first = (_fits(sides, self.input_size[1:]) for sides in (shape[:2], shape[1:]))
        if channels_last != channels_first:
            return "nhwc" if channels_last else "nchw"
        return "nhwc" if self.output_fmt == "NHWC" else "nchw"


def _batch_first(call: Call) -> bool:
    """Does the output carry the batch, and all of it in the first dimension, sample by sample?"""
    dims = {leaf.batch_dim for leaf in call.leaves}
    return 0 in dims and dims <= {0, None} and all(leaf.together for leaf in call.leaves)
