"""Beyond Uniform Scaling: a small vision transformer whose neurons at saddles get branches.

python examples/scale_a_vit.py
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

import growkernels as gk
from growkernels.models.deit import deit


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="before and after the growth")
    parser.add_argument("--embed", type=int, default=48)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--budget", type=int, default=20_000, help="parameters")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    # Images of one bright quarter, and which one it is.
    labels = torch.arange(4).repeat(16)
    images = torch.randn(len(labels), 3, 16, 16) / 4
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    model = deit(
        embed=options.embed, depth=options.depth, heads=2, attention_width=options.embed // 2,
        mlp_width=options.embed * 2, patch=4, image_size=16, classes=4, drop_path=0.0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def parameters() -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def train() -> float:
        for step in range(options.steps):
            half = slice(step % 2, None, 2)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[half]), labels[half])
            loss.backward()
            optimizer.step()
        return F.cross_entropy(model(images), labels).item()

    before, small = train(), parameters()
    scaling = gk.growth.NeuronScaling(model)
    optimizer.zero_grad()
    for half in range(2):
        with scaling.recording():
            F.cross_entropy(model(images[half::2]), labels[half::2]).backward()
    # The paper asks for 60 neurons at a saddle in a layer; narrow ones have fewer.
    chosen = scaling.select(scaling.scores(), budget=options.budget, min_eligible=4)
    print(chosen)
    if chosen:
        scaling.grow(chosen, optimizer)
    same = F.cross_entropy(model(images), labels).item()
    after = train()
    print(f"{small} parameters: loss {before:.4f}; grown to {parameters()}: {same:.4f}, ", end="")
    print(f"trained on: {after:.4f}")
    return {"before": before, "same": same, "after": after, "new": parameters() - small}


if __name__ == "__main__":
    main()
