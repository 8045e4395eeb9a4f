"""GradMax: hidden layers that get the neurons which lower the loss fastest, under one budget.

python examples/widen.py
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import growkernels as gk


class Perceptron(nn.Module):
    """Two hidden layers, in a forward of its own: structure is read from one pass of a sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.first(x))
        out: torch.Tensor = self.head(F.relu(self.second(hidden)))
        return out


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="between growths")
    parser.add_argument("--growths", type=int, default=3)
    parser.add_argument("--budget", type=int, default=400, help="parameters per growth")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    teacher = Perceptron(64)
    batches = [torch.randn(64, 12) for _ in range(8)]
    targets = [teacher(x).detach() for x in batches]
    model = Perceptron(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(index: int) -> torch.Tensor:
        return F.mse_loss(model(batches[index]), targets[index])

    result: dict[str, float] = {}
    scaling = gk.growth.NeuronScaling(
        model, "gradmax", widen=("fc1",), depth=False, sample=batches[0]
    )
    for growth in range(options.growths + 1):
        for step in range(options.steps):
            optimizer.zero_grad()
            loss(step % len(batches)).backward()
            optimizer.step()
        result[f"loss{growth}"] = sum(loss(i).item() for i in range(len(batches))) / len(batches)
        widths = model.first.out_features, model.second.out_features
        print(f"loss {result[f'loss{growth}']:.5f} with hidden layers of {widths}")
        if growth == options.growths:
            break
        optimizer.zero_grad()
        for index in range(len(batches)):
            with scaling.recording():
                loss(index).backward()
        chosen = scaling.select(scaling.scores(), budget=options.budget, min_eligible=1)
        print(chosen)
        if chosen:
            scaling.grow(chosen, optimizer, init="gradmax")
    scaling.close()
    return {**result, "neurons": model.first.out_features + model.second.out_features}


if __name__ == "__main__":
    main()
