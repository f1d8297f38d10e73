"""Models of timm's with untrained exits: what exits cost and save does not wait for training."""

from __future__ import annotations

import torch
from torch import Tensor

from dynnet import DynamicModel, fold, wrap
from dynnet.backbone.modes import device_of
from dynnet.thresholds.answers import ask
from eval.programs import timm_model


def untrained(name: str, exits: int | list[str]) -> DynamicModel:
    """A model of timm's with random weights and exits, so many or by name, which nobody takes.

    Raises:
        InputError: timm has no model of this name.
        ExitError: so many exits have no place in it.
    """
    torch.manual_seed(0)
    model = wrap(timm_model(name), exits)
    model.thresholds = [2.0] * len(model.exits)
    return model


def ready(model: DynamicModel, channels_last: bool = True, folded: bool = True, device: str = "cpu") -> DynamicModel:
    """A model as it is timed eagerly; where nothing changes, the same."""
    if folded:
        model = fold(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(device)


def random_images(model: DynamicModel, batch_size: int) -> Tensor:
    """(M, C, H, W) noise of which batches can be made, 16 images at least."""
    return torch.randn(max(16, batch_size), *model.input_size)


def scenarios(model: DynamicModel, images: Tensor) -> dict[str, list[float]]:
    """Thresholds by name: nobody leaves, half or all leave at an exit. The heads of untrained exits answer at random,
    but what they cost is real.

    Args:
        model: in eval mode.
        images: (M, C, H, W), of which half shall leave.
    """
    off, confidences = float("inf"), ask(model, images.to(device_of(model)), None).confidences
    count = len(model.exits)
    found = {"nobody leaves": [2.0] * count}
    for i, name in enumerate(model.exits):
        others = [off] * count
        found[f"half leaves at {name}"] = [*others[:i], _middle(confidences[:, i]), *others[i + 1 :]]
        found[f"all leave at {name}"] = [*others[:i], -off, *others[i + 1 :]]
    return found


def half_at_each(model: DynamicModel, images: Tensor) -> list[float]:
    """Thresholds at which half of those that are still here leave, at each exit."""
    found: list[float] = []
    here = torch.ones(len(images), dtype=torch.bool)
    for confidence in ask(model, images.to(device_of(model)), None).confidences[:, : len(model.exits)].T:
        found.append(_middle(confidence[here]) if int(here.sum()) > 1 else float("inf"))
        here &= confidence < found[-1]
    return found


def _middle(confidence: Tensor) -> float:
    """Between the half that is surer and the half that is less so."""
    rising = confidence.sort().values
    half = len(rising) // 2
    return float(rising[half - 1 : half + 1].mean())
