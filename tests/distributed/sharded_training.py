"""The network of all surgeries over several processes: built, sharded, and trained on parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from all_surgeries import Network, batch, network
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer


def build_on_meta() -> Network:
    with torch.device("meta"):
        return network().double()


def shard(model: nn.Module) -> None:
    fully_shard(model.mlp)
    fully_shard(model)


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    """Muon takes the matrices, AdamW the rest."""
    return [
        torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01),
    ]


def train_on_part(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    rank: int = 0,
    ranks: int = 1,
    steps: int = 3,
) -> list[Tensor]:
    """Steps on one batch, of which each rank has its part; the losses of this one's."""
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    model.eval()  # a batch norm in training mode sees a part of the batch alone
    x, y = batch()
    x, y = torch.cat([x, x + 1])[:8].double(), torch.cat([y, y])[:8]
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = F.cross_entropy(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank])
        loss.backward()
        for part in optimizers:
            part.step()
        losses.append(loss.detach())
    return losses
