"""DeiT-S written out: the training step that the cost of a merit pass is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, DEPTH, HEADS, HIDDEN = 384, 12, 6, 1536
PATCH, IMAGE, CLASSES = 16, 224, 1000
TOKENS = (IMAGE // PATCH) ** 2 + 1


class Block(nn.Module):
    """Pre-norm attention and MLP, both residual; tokens [N, T, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        tokens = tokens + self.projection(mixed)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class DeiT(nn.Module):
    """Images [N, 3, 224, 224] to logits [N, 1000] (Touvron et al., arXiv 2012.12877, DeiT-S)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.places))[:, 0])
        return logits


def training_step_flops(images: int) -> float:
    """Matrix products of forward and backward, the backward pass counted as twice the forward."""
    tokens = images * TOKENS
    linear = tokens * DEPTH * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN)
    attention = tokens * DEPTH * 2 * TOKENS * WIDTH
    patches = images * (TOKENS - 1) * 3 * PATCH**2 * WIDTH
    return 3 * 2.0 * (linear + attention + patches + images * WIDTH * CLASSES)
