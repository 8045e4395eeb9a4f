"""A grown network goes on from a file, in a process that only knows how to build the first one.

python examples/resume.py --out run       # stop it at any time (Ctrl-C), and start it again
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import growkernels as gk


def build() -> nn.Sequential:
    """What the code knows; how it has grown since is in the file."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 8, generator=generator)
    return x, x[:, :3].argmax(dim=1)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {
        "step": step,
        "growth": gk.growth.insertions(model),  # small dictionaries
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    part = path.with_suffix(".part")  # a run that is killed here leaves the older file
    torch.save(state, part)
    part.replace(path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--grow-at", type=int, nargs="*", default=[500, 1000])
    parser.add_argument("--save-every", type=int, default=100)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "state.pt"

    model, start = build(), 0
    saved = torch.load(path, weights_only=True) if path.exists() else None
    if saved is not None:
        gk.growth.rebuild(model, saved["growth"])  # first what it has grown by,
        model.load_state_dict(saved["model"])  # then the values
        start = saved["step"]
        print(f"goes on from step {start} with {len(saved['growth'])} layers inserted")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])

    inserter = gk.growth.LayerInsertion(model)
    for step in range(start, options.steps):
        x, y = batch(step)
        if step in options.grow_at:
            optimizer.zero_grad()
            with inserter.recording():
                F.cross_entropy(model(x), y).backward()
            if position := inserter.select(inserter.merits()):
                inserter.insert(position, optimizer)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if (step + 1) % options.save_every == 0:
            save(path, model, optimizer, step + 1)
    loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    print(f"loss {loss.item():.4f} after {options.steps} steps, {len(model)} modules")
    return {"loss": loss.item(), "records": gk.growth.insertions(model)}


if __name__ == "__main__":
    main()
