"""Growth inside Lightning's Trainer, by a callback.

python examples/lightning_trainer.py          # needs pip install 'growkernels[lightning]'
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import growkernels as gk


class Classifier(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="steps between growths")
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args(arguments)

    pl.seed_everything(0)
    x = torch.randn(256, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(dim=1)), batch_size=32, shuffle=True)
    module = Classifier(options.width)
    # Due after step `every` and every `every` steps from there on. The backward pass of the next
    # step is recorded, and the part of the module that is named grows at that step's end.
    grow = gk.integrations.lightning.Grow(
        gk.growth.Interval(warmup=options.every, every=options.every), module="net"
    )
    trainer = pl.Trainer(
        max_steps=options.steps,
        callbacks=[grow],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    print(f"grown at steps {grow.grown}")
    print(module.net)
    return {"growths": len(grow.grown), "modules": len(module.net)}


if __name__ == "__main__":
    main()
