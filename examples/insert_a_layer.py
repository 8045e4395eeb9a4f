"""SensLI on two spirals: one layer inserted where its merit is largest, in an ordinary loop.

python examples/insert_a_layer.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growkernels as gk


def two_spirals(points: int) -> tuple[Tensor, Tensor]:
    """`points` on each of two arms that wind around one another."""
    angle = torch.linspace(0.5, 3, points) * torch.pi
    arm = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 10
    return torch.cat([arm, -arm]), torch.arange(2).repeat_interleave(points)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="before and after the insertion")
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y = two_spirals(200)
    model = nn.Sequential(
        nn.Linear(2, options.width),
        nn.ReLU(),
        nn.Linear(options.width, options.width),
        nn.ReLU(),
        nn.Linear(options.width, 2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train() -> float:
        for _ in range(options.steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return F.cross_entropy(model(x), y).item()

    before = train()

    # One pass without an update shows what a layer would gain, at every position at once.
    inserter = gk.growth.LayerInsertion(model)
    optimizer.zero_grad()
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    merits = inserter.merits()
    print(merits)
    position = inserter.select(merits)
    if position is None:
        raise SystemExit("No position is worth a layer; train on, and ask again later.")
    inserter.insert(position, optimizer)

    # The new layer is the identity at first: nothing is lost.
    same = F.cross_entropy(model(x), y).item()
    after = train()
    print(f"inserted at {position}; loss {before:.4f}, the same {same:.4f}, then {after:.4f}")
    print(model)
    return {"before": before, "same": same, "after": after}


if __name__ == "__main__":
    main()
