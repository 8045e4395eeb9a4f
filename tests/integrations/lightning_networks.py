"""A LightningModule whose training a plain loop can repeat."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from small_networks import batches, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

STEPS = 12
ROWS = 4


def make_optimizer(model: nn.Module) -> tuple[Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return optimizer, LambdaLR(optimizer, lambda step: 0.9**step)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = make_optimizer(self)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def rows() -> tuple[Tensor, Tensor]:
    (x, y), *_ = batches(mlp(), 1, STEPS * ROWS)
    return x, y


def loader(rows_per_batch: int = ROWS) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows()), batch_size=rows_per_batch)


def trainer(folder: Any, callbacks: list[Any], steps: int = STEPS, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"devices": 1, "enable_checkpointing": False, **settings},
    )
