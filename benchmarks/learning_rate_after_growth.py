"""`python -m benchmarks.learning_rate_after_growth`: what the learning rate should do at a growth.

A perceptron learns the classes of a random teacher, and its hidden layers get 1,575 parameters
more after a third of the steps, by neurons of GradMax's directions. From there on the learning rate
goes one of the ways that are taken. The table of docs/wider_layers.md is what this prints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.experiments.statistics import estimate
from growkernels.growth import NeuronScaling, WarmUp

STEPS, GROWTH, BATCH, PEAK = 1200, 400, 64, 1e-2
RUNS = 8
WAYS = {
    "goes on as planned": "the schedule of a network that does not grow",
    "new parameters warm up": "the same, over 100 steps for what is new (`gk.growth.WarmUp`)",
    "again from its peak": "to the same peak, then a faster decay (LEMON, arXiv 2310.07999)",
    "a tenth of its peak": "as when a trained network is fine-tuned",
}


def data(seed: int) -> tuple[Tensor, Tensor]:
    """12,288 inputs [24] and the classes of 8 that a random perceptron gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12_288, 24, generator=generator)
    h = x
    for width in (48, 48, 8):
        weight = torch.randn(h.shape[1], width, generator=generator) * 2 / h.shape[1] ** 0.5
        h = (h @ weight).tanh() if width > 8 else h @ weight
    return x, h.argmax(1)


def rate(way: str, step: int) -> float:
    def decayed(share: float) -> float:
        return PEAK * 0.5 * (1 + math.cos(math.pi * share))

    since = (step - GROWTH) / (STEPS - GROWTH)
    if step < GROWTH or way in ("goes on as planned", "new parameters warm up"):
        return decayed(step / STEPS)
    return decayed(since) * (0.1 if way == "a tenth of its peak" else 1.0)


def grow(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    scaling = NeuronScaling(
        model, "gradmax", layers=["0", "2"], widen=("fc1",), depth=False, sample=x[:2]
    )
    for batch, labels in zip(x.split(BATCH)[:8], y.split(BATCH)[:8], strict=True):
        with scaling.recording():
            F.cross_entropy(model(batch), labels).backward()
    chosen = scaling.select(scaling.scores(), budget=3000, min_eligible=1)
    scaling.grow(chosen, optimizer, init="gradmax")
    scaling.close()


def train(way: str, run: int) -> float:
    """Loss at the end on 4,096 inputs that were not trained on."""
    x, y = data(run)
    held_x, held_y, x, y = x[:4096], y[:4096], x[4096:], y[4096:]
    torch.manual_seed(run)
    hidden = (nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
    model = nn.Sequential(*hidden, nn.Linear(24, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    generator = torch.Generator().manual_seed(run)
    for step in range(STEPS):
        if step == GROWTH:
            if way == "new parameters warm up":
                WarmUp(model, optimizer, steps=100)
            grow(model, optimizer, x, y)
        for group in optimizer.param_groups:
            group["lr"] = rate(way, step)
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(held_x), held_y).item()


def main() -> None:
    torch.set_num_threads(1)
    print("| learning rate after the growth | as | test loss | against the first, run by run |")
    print("| --- | --- | --- | --- |")
    planned: list[float] = []
    for way, why in WAYS.items():
        losses = [train(way, run) for run in range(RUNS)]
        planned = planned or losses
        apart = estimate([a - b for a, b in zip(losses, planned, strict=True)]).text()
        print(f"| {way} | {why} | {estimate(losses).text()} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
