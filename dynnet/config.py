"""How a backbone is wrapped."""

from __future__ import annotations

from dataclasses import dataclass

from dynnet.gates.plan import GateConfig


@dataclass(frozen=True)
class WrapConfig:
    """How a backbone is wrapped.

    Attributes:
        exits: module names ("layer2"), fractions of the backbone's MACs (0.5), both mixed, or a number of exits spread
            evenly in MACs; of a wrapped model the module names, in running order.
        gates: how channels are gated; None where they are not.
        head_share: MACs for which a fitted head is made, as a share of the backbone's; it costs at most twice that, and
            where not even the narrowest can, `wrap` warns.
        head_blocks: may a fitted head have residual blocks, where `head_share` has room for them? Files of before have
            none.
        confidence: name of the measure, see `dynnet.exits.confidence`.
        input_size: (C, H, W) of the images, for which fractions, heads and prices are computed; None for what the
            backbone was made for.
    """

    exits: int | tuple[str | float, ...] = 2
    gates: GateConfig | None = None
    head_share: float = 0.03
    head_blocks: bool = True
    confidence: str = "max_probability"
    input_size: tuple[int, int, int] | None = None
