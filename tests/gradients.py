"""A program: five training steps of narrow networks, the gradient of every convolution checked.

    ONEDNN_MAX_CPU_ISA=AVX2 python -m tests.gradients 1      # on one thread, with the kernels of another processor
    ONEDNN_MAX_CPU_ISA=AVX2 python -m tests.gradients 2 1    # on two, and one training step only

A whole network bends at every ReLU, so that rounding alone moves its gradients by any amount. Each weight's gradient is
therefore compared with what the layer's own input and output gradient give, in double precision and contiguous. The
exit status is the number of networks with a wrong one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # other tests run beside

import timm
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

import dynnet

# Relative to the sum of the sizes of all products, of which most cancel. Processors without bfloat16 sum in it as well.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-4}


def watch(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """By convolution, "x" that it was last given and "dy" of what it gave."""
    seen: dict[str, dict[str, Tensor]] = {}

    def hook(name: str) -> Any:
        def look(layer: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = {"x": args[0].detach().to(output.dtype)}
            output.register_hook(lambda gradient: seen[name].update(dy=gradient))

        return look

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(hook(name))
    return seen


def worst(model: nn.Module, images: Tensor, dtype: torch.dtype, steps: int) -> float:
    """The largest error over all steps and convolutions."""
    seen = watch(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(images).logits
        torch.stack([x.float().logsumexp(1).mean() for x in logits]).sum().backward()
        for name, given in seen.items():
            layer: Any = model.get_submodule(name)
            x, dy = (given[key].double().clone(memory_format=torch.contiguous_format) for key in ("x", "dy"))
            right, size = (
                conv2d_weight(a, layer.weight.shape, b, layer.stride, layer.padding, groups=layer.groups)
                for a, b in ((x, dy), (x.abs(), dy.abs()))
            )
            wrong = ((layer.weight.grad.double() - right) / size.clamp(min=1e-30)).abs().max()
            found = max(found, float(wrong.nan_to_num(nan=torch.inf)))
        optimizer.step()
    return found


def main(threads: int, steps: int = 5) -> int:
    torch.set_num_threads(threads)
    failed = 0
    for width in range(1, 9):
        for dtype, rounding in ROUNDING.items():
            for layout in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(width)
                backbone = timm.create_model("cifar_resnet20", width=width / 16, in_chans=1, num_classes=10)
                model = dynnet.wrap(backbone, ["layer2.0"], head_share=0.1, input_size=(1, 8, 8)).train()
                model.to(memory_format=layout)
                found = worst(model, torch.randn(64, 1, 8, 8).to(memory_format=layout), dtype, steps)
                print(f"{width} channels, {dtype}, {layout}, threads {threads}: {found:.1e}", flush=True)
                failed += found > rounding
    return failed


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
