"""Basis convolutions in a ResNet for a part of its training, and ordinary ones again after it.

python examples/convert_a_resnet.py
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import growkernels as gk
from growkernels.models.resnet import resnet18


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="in each of the two parts")
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage")
    parser.add_argument("--size", type=int, default=32, help="pixels along an image's edge")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    images = torch.randn(64, 3, options.size, options.size)
    labels = torch.randint(10, (64,))
    model = resnet18(width=options.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def train() -> float:
        total = 0.0
        for _ in range(options.steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / options.steps

    # Half of the filters in every 3x3 convolution of the last two stages: 64 of 128 are trained,
    # the others are linear combinations of what these give.
    plan = {
        name: 0.5
        for name, layer in model.named_modules()
        if name.startswith(("layer3", "layer4"))
        and isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (3, 3)
    }
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(gk.nn.convert(model, plan, optimizer))
    fewer = sum(parameter.numel() for parameter in model.parameters())
    first = train()

    # Back: the same function, with all filters free, and SGD's momentum carried along.
    model.eval()
    with torch.no_grad():
        mixed = model(images)
    gk.nn.convert(model, dict.fromkeys(plan, 1.0), optimizer)
    with torch.no_grad():
        difference = float((model(images) - mixed).abs().max() / mixed.abs().max())
    model.train()
    second = train()
    print(f"{weights} weights, {fewer} with bases; loss {first:.3f}, then {second:.3f}")
    print(f"back to ordinary convolutions changed the outputs by {difference:.1e} of the largest")
    return {"weights": weights, "fewer": fewer, "difference": difference}


if __name__ == "__main__":
    main()
