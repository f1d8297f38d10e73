"""Cascades: several models in a row, the next one asked only about what the one before is unsure of.

A cascade is a wrapped model like any other. Its backbone is a chain, which runs all of its members; exits stand at the
end of each but the last, where the logits that are there already are the answer, and wherever a member has exits of its
own. Rows leave, bills, thresholds, files and stages are those of exits. (Wang et al., "Wisdom of Committees",
https://arxiv.org/abs/2012.01988)

    B batch, K classes, M members
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dynnet.backbone.chain import Chain, Combine, Entry, Join
from dynnet.backbone.host import preparation_of
from dynnet.backbone.input_size import input_size_of
from dynnet.backbone.names import title
from dynnet.backbone.twin import copy_of
from dynnet.config import WrapConfig
from dynnet.errors import CascadeError
from dynnet.exits.boundaries import Places
from dynnet.exits.confidence import MEASURES
from dynnet.exits.heads import heads_by_name
from dynnet.gates.plan import GateConfig
from dynnet.gates.routers import Routers
from dynnet.model import DynamicModel
from dynnet.wrapping import is_wrapped, wrap

Size = tuple[int, int, int]


def cascade(
    members: Sequence[nn.Module],
    *,
    combine: Combine = "last",
    confidence: Any = None,
    input_sizes: Sequence[Size] | None = None,
) -> DynamicModel:
    """Models in a row: the next one is asked about what the one before is unsure of.

    >>> import timm, torch, dynnet
    >>> small, large = (timm.create_model(name, num_classes=10).eval() for name in ("cifar_resnet20", "cifar_resnet56"))
    >>> pair = cascade([small, large])
    >>> pair.exits
    ('members.0',)
    >>> pair.thresholds = [0.9]  # as surely as that the first one must answer
    >>> pair.predict(torch.randn(4, 3, 32, 32)).logits.shape
    torch.Size([4, 10])

    Args:
        members: two or more, the cheapest first: plain or pruned timm models, or wrapped ones with exits, gates or
            both. They are copied, and left as they are. The same model may come twice, at two sizes.
        combine: "last": the answer of the last member asked counts; "mean": the mean of the probabilities of all that
            were asked, also at exits inside of members.
        confidence: as for `dynnet.wrap`; by default what wrapped members have, else "max_probability".
        input_sizes: (C, H, W) of each member's images; by default what it was made for. An image comes in once, at the
            largest size, prepared as for the last member, and is resized inside.

    Returns:
        A model in eval mode. Exits inside of members keep their thresholds; those at the ends of members are at inf:
        everything goes on to the last. "Dense" is the last member alone, in its bills' shares and wherever it is
        compared.

    Raises:
        CascadeError: fewer than two members, one that is a cascade or in train mode, or classes, channels, confidences
            or kinds of gates that differ.
        ExitError: a member that cannot run on its size.
    """
    if combine not in get_args(Combine):
        raise CascadeError(f"combine={combine!r}: choose from {', '.join(get_args(Combine))}")
    taken = _taken(members, input_sizes)
    size = max((one.size for one in taken), key=lambda size: size[1] * size[2])
    last = taken[-1]
    preparation = {**preparation_of(last.backbone), "input_size": size, **_names(taken)}
    entries = [_between(one, last, size) for one in taken]
    sizes = [one.size for one in taken]
    wraps = [None if one.wrapped is None else one.wrapped.config for one in taken]
    chain = Chain([one.backbone for one in taken], entries, combine, preparation, sizes, wraps)
    thresholds: dict[str, float] = {}
    heads: dict[str, nn.Module] = {}
    exits = sum(len(one.exits) for one in taken) + len(taken) - 1
    for number, one in enumerate(taken):
        before = len(heads) - 1  # where the member before has answered
        for name, head, threshold in one.exits:
            joined = head if combine == "last" or number == 0 else JoinedHead(head, before, number)
            assert one.wrapped is not None
            heads[f"members.{number}.{name}"] = joined
            thresholds[f"members.{number}.{name}"] = one.wrapped.measure.rescaled(threshold, exits)
        if one is not last:
            heads[chain.end(number)], thresholds[chain.end(number)] = Said(), float("inf")

    measure = _measure(taken, confidence)
    config = WrapConfig(exits=tuple(heads), gates=_gates(taken), confidence=measure, input_size=size)
    model = wrap(chain, config, heads=heads_by_name(heads))
    _carry_gates(model, taken)
    model.thresholds = list(thresholds.values())
    return model


def members_of(model: DynamicModel) -> list[nn.Module]:
    """The members of a cascade as `cascade` takes them: copies, plain or wrapped, with their thresholds."""
    twin = copy_of(model)
    chain = twin.unwrap()
    assert isinstance(chain, Chain)
    deciding = _deciding(twin)
    found: list[nn.Module] = []
    for number, (member, config) in enumerate(zip(chain.members, chain.wraps, strict=True)):
        prefix = f"members.{number}."
        inside = {
            name.removeprefix(prefix): (head.head if isinstance(head, JoinedHead) else head, threshold)
            for name, head, threshold in zip(twin.exits, twin.heads, twin.thresholds, strict=True)
            if name.startswith(prefix)
        }
        if config is not None:
            plain = replace(config, confidence=WrapConfig().confidence)  # which is the cascade's to say
            again = wrap(member, plain, heads=heads_by_name({name: head for name, (head, _) in inside.items()}))
            again.thresholds = [threshold for _, threshold in inside.values()]
            for (layer, groups), network in _deciding(again).items():
                network.load_state_dict(deciding[f"{prefix}{layer}", groups].state_dict())
            member = again
        found.append(member)
    return found


class JoinedHead(nn.Module):
    """An exit inside of a member, of which the answer is joined to those of the members before.

    Attributes:
        joins: the number of the exit at which these have answered.

    Args:
        head: of the exit.
        joins: as above.
        number: of the members before.
    """

    def __init__(self, head: nn.Module, joins: int, number: int) -> None:
        super().__init__()
        self.head, self.joins, self.join = head, joins, Join(number)

    def forward(self, output: Any, before: Tensor) -> Tensor:
        """The boundary's output, and (B, K) of those before, to (B, K)."""
        joined: Tensor = self.join(before, self.head(output))
        return joined


class Said(nn.Module):
    """The head at the end of a member: its answer is there already."""

    def forward(self, logits: Tensor) -> Tensor:
        """(B, K), as it is."""
        return logits


@dataclass(frozen=True)
class _Taken:
    """A member: a copy of its backbone, its exits (name, head, threshold), and what else it was wrapped with."""

    backbone: nn.Module
    size: Size
    classes: int
    exits: tuple[tuple[str, nn.Module, float], ...] = ()
    wrapped: DynamicModel | None = None


def _taken(members: Sequence[nn.Module], sizes: Sequence[Size] | None) -> list[_Taken]:
    if isinstance(members, nn.Module) or len(members) < 2:
        count = "one model" if isinstance(members, nn.Module) or len(members) else "no models"
        raise CascadeError(f"got {count}; give two or more, the cheapest first; one model alone is dynnet.wrap's")
    if sizes is not None and len(sizes) != len(members):
        raise CascadeError(f"got {len(sizes)} input_sizes for {len(members)} members; give (C, H, W) for each")
    found = [_take(member, n, sizes[n] if sizes else None) for n, member in enumerate(members)]
    for what, values in (
        ("classes", [one.classes for one in found]),
        ("channels", [one.size[0] for one in found]),
        ("types", [str(_weight(one.backbone).dtype).removeprefix("torch.") for one in found]),
        ("devices", [str(_weight(one.backbone).device) for one in found]),
    ):
        if len(set(values)) > 1:
            raise CascadeError(f"members have {values} {what}; they must have the same")
    return found


def _take(member: nn.Module, number: int, size: Size | None) -> _Taken:
    backbone = member.backbone if isinstance(member, DynamicModel) else member
    if isinstance(backbone, Chain):
        raise CascadeError(f"member {number} is a cascade itself; give its members in its place")
    if member.training or backbone.training:
        raise CascadeError(f"member {number}, {title(backbone)}, is in train mode; call .eval() first")
    if not isinstance(member, DynamicModel):
        if is_wrapped(member):
            raise CascadeError(f"member {number} is the backbone of a wrapped model; give that model, or unwrap() it")
        size = size or input_size_of(member)
        return _Taken(copy_of(member), size, Places(member, size).num_classes)
    if member.gates is not None and member.gates.frozen is not None:
        raise CascadeError(f"the gates of member {number} are frozen, which a cascade cannot keep; call .gates.thaw()")
    twin = copy_of(member)
    exits = tuple(zip(member.exits, twin.heads, member.thresholds, strict=True))
    return _Taken(twin.unwrap(), size or member.input_size, member.num_classes, exits, twin)


def _names(taken: Sequence[_Taken]) -> dict[str, Any]:
    known = {names for one in taken if (names := preparation_of(one.backbone).get("label_names")) is not None}
    if len(known) > 1:
        raise CascadeError(
            "members have other names for their classes; what one calls class 0, another must call so too"
        )
    return {"label_names": known.pop()} if known else {}


def _between(one: _Taken, last: _Taken, size: Size) -> Entry:
    """From a chain's images, prepared as for its last member, to those of another."""
    resized = None if one.size[1:] == size[1:] else one.size[1:]
    mine, theirs = (preparation_of(member.backbone) for member in (one, last))
    given = [mine.get("mean"), mine.get("std"), theirs.get("mean"), theirs.get("std")]
    if None in given or (given[:2] == given[2:]):
        return Entry(resized)
    mean, std, mean_there, std_there = (torch.tensor(values).view(1, -1, 1, 1) for values in given)
    weight = _weight(one.backbone)
    scale, shift = (values.to(weight.device, weight.dtype) for values in (std_there / std, (mean_there - mean) / std))
    return Entry(resized, scale, shift)


def _weight(model: nn.Module) -> Tensor:
    """One that tells the device and the type of a model."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def _measure(taken: Sequence[_Taken], confidence: Any) -> Any:
    if confidence is not None:
        return confidence
    names = {one.wrapped.measure.name for one in taken if one.wrapped is not None and one.exits}
    if len(names) > 1:
        raise CascadeError(f"members measure confidence by {', '.join(sorted(names))}; choose one with confidence=")
    name = names.pop() if names else WrapConfig().confidence
    if name not in MEASURES:
        raise CascadeError(f"a member measures confidence by {name!r}, a function; give that as confidence=")
    return name


def _gates(taken: Sequence[_Taken]) -> GateConfig | None:
    """One configuration for all gated members; what else there is, is excluded."""
    exclude: list[str] = []
    configs: list[GateConfig] = []
    for number, one in enumerate(taken):
        config = one.wrapped.config.gates if one.wrapped is not None else None
        if config is None:
            exclude.append(f"members.{number}")
        else:
            configs.append(replace(config, exclude=()))
            exclude += [f"members.{number}.{name}" for name in config.exclude]
    if not configs:
        return None
    if len(set(configs)) > 1:
        raise CascadeError(f"members are gated in different ways: {', '.join(map(str, dict.fromkeys(configs)))}")
    return replace(configs[0], exclude=tuple(exclude))


def _carry_gates(model: DynamicModel, taken: Sequence[_Taken]) -> None:
    """Give the gate networks of a cascade the weights of its members'.

    Raises:
        CascadeError: their regions are others.
    """
    mine = _deciding(model)
    theirs = {
        (f"members.{number}.{layer}", groups): network
        for number, one in enumerate(taken)
        if one.wrapped is not None
        for (layer, groups), network in _deciding(one.wrapped).items()
    }
    if mine.keys() != theirs.keys():
        model.unwrap()
        raise CascadeError(
            "gates of the members decide on other regions in a row than alone; cascade them without gates"
        )
    for region, network in mine.items():
        network.load_state_dict(theirs[region].state_dict())


def _deciding(model: DynamicModel) -> dict[tuple[str, tuple[int, ...]], nn.Module]:
    """All that gates have learnt: networks by their regions (the layer at whose entry they decide, and how many units
    of each group), and what batch norms remember of each width, by their names."""
    gates = model.gates
    if gates is None:
        return {}
    regions = [(region.layer, region.groups) for region in gates.plan.regions]
    found = dict(zip(regions, gates.networks, strict=True))
    if isinstance(gates, Routers):
        found |= {(name, ()): gates.norms[number] for name, number in gates.number.items()}
    return found
