"""Every public name, as a user would write it."""

from __future__ import annotations

from collections.abc import Iterable

import timm
import torch
from torch import Tensor, nn

import dynnet
from dynnet import DynamicModel, GateConfig, Prediction, WrapConfig


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))]


def build(loader: Iterable[tuple[Tensor, Tensor]]) -> DynamicModel:
    backbone: nn.Module = timm.create_model("cifar_resnet20", num_classes=10)
    slim: nn.Module = dynnet.prune(backbone, macs=0.7, criterion="l1")
    dynnet.pruning.recalibrate_(slim, batches())
    config = WrapConfig(exits=("layer1",), gates=GateConfig(unit=4), head_share=0.05)
    model: DynamicModel = dynnet.wrap(slim, config)
    for images, target in loader:
        outputs = model.train()(images)
        torch.autograd.backward(dynnet.loss(outputs, target))  # Tensor.backward has no types
    return model.eval()


def use(model: DynamicModel, images: Tensor) -> None:
    fitted = dynnet.calibrate(model, batches(), budget=0.9)
    prediction: Prediction = model.predict(images)
    exits: list[int] = prediction.exit.tolist()
    print(fitted, exits, prediction.flops.sum().item())
    print(dynnet.measure(model, batches()).macs_share, dynnet.latency(dynnet.fold(model), images).speedup)
    print(dynnet.verify(model, images))
    try:
        dynnet.save(model, "model.safetensors")
        print(dynnet.load("model.safetensors").exits)
    except dynnet.errors.DynnetError as error:
        print(error)
    gated = dynnet.wrap(timm.create_model("cifar_resnet20", num_classes=10), 2, gates="channel").eval()
    pair = dynnet.cascade([dynnet.consolidate(gated, batches()).unwrap(), model])
    print(pair.exits)
    manifest = dynnet.export(model, "stages", int8=True, loader=batches())
    print(manifest.precision, dynnet.list_models(), dynnet.create_model("digits").thresholds)


if __name__ == "__main__":
    use(build(batches()), torch.randn(8, 3, 32, 32))
