"""Sizes of the batch that a forward notes before an exit, and reshapes with afterwards, when there may be fewer rows.

Some forwards begin with `B = x.shape[0]` and end with `x.reshape(B, H, W, -1)`. A rehearsal on the meta device, where
the sizes of the batch are numbers that nothing else has, shows at which lines of the forward that happens; there, and
nowhere else, the present size is put in a past one's place. Another reshape may well be given a number that was the
batch's by chance: a table of 8 rows beside a batch of 8.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dynnet.exits.rows import Rows

# Where a tensor is shaped: (module, function, instruction) of the line, and of the line that called its function.
Line = tuple[tuple[str, str, int], ...]

_RESHAPES = {Tensor.reshape, Tensor.view, Tensor.expand, torch.reshape}


class NotedSizes(TorchFunctionMode):
    """While active, calls that shape a tensor of the present batch to a past one get the present size.

    Only for backbones that need it: every torch function then costs a Python call.

    Args:
        rows: of the call.
        lines: where to correct; None for everywhere, in a rehearsal.

    Attributes:
        met: in a rehearsal, where something was corrected.
    """

    def __init__(self, rows: Rows, lines: Collection[Line] | None) -> None:
        super().__init__()
        self.rows, self.lines = rows, lines
        self.met: set[Line] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.rows.here is not None and func in _RESHAPES and len(args) > 1:
            x, *sizes = args
            nested = isinstance(sizes[0], (tuple, list))
            first, *rest = sizes[0] if nested else sizes
            if isinstance(first, int) and x.shape[0] in (1, self.rows.size) and self._is_past(first):
                shape = (self.rows.size, *rest)
                args = (x, shape) if nested else (x, *shape)
        return func(*args, **(kwargs or {}))

    def _is_past(self, size: int) -> bool:
        """Is it the batch's size of an earlier moment, at a line that means it?"""
        if self.rows.since(size) is None:
            return False
        line = _line(sys._getframe(2))
        if self.lines is None:
            self.met.add(line)
            return True
        return line in self.lines


def _line(frame: FrameType | None) -> Line:
    found: list[tuple[str, str, int]] = []
    while frame is not None and len(found) < 2:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("dynnet.") and not module.startswith("dynnet.learning."):
            if found:
                break  # who called the forward differs from a rehearsal to a run
        elif module != "torch" and not module.startswith("torch."):
            found.append((module, frame.f_code.co_qualname, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)
