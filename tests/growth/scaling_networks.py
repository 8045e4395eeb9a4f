"""Small networks for the tests of neuron scaling, and batches for them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Batches, random_batches, record

from growkernels.growth import NeuronScaling, grow_state, insertions, rebuild
from growkernels.models.deit import DeiT, deit


def small_deit(dtype: torch.dtype = torch.float64, **changes: Any) -> DeiT:
    sizes: dict[str, Any] = {
        "embed": 12,
        "depth": 2,
        "heads": 3,
        "attention_width": 6,
        "mlp_width": 8,
        "patch": 4,
        "image_size": 8,
        "classes": 4,
        "drop_path": 0.0,
        "generator": torch.Generator().manual_seed(3),
    }
    model = deit(**{**sizes, **changes}).to(dtype)
    # DeiT's initial values are so small that its softmax is flat and its GELUs are linear.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


class FusedAttention(nn.Module):
    """Attention in the structure of timm's: query, key and value in one linear layer."""

    def __init__(self, embed: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(embed, 3 * embed)
        self.proj = nn.Linear(embed, embed)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind()).transpose(1, 2).reshape(n, t, d)
        out: Tensor = self.proj_drop(self.proj(mixed))
        return out


class TimmMlp(nn.Module):
    """The structure of timm's Mlp."""

    def __init__(self, embed: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, embed)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        out: Tensor = self.drop2(self.fc2(x))
        return out


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attn = FusedAttention(8, 2)
        self.norm2 = nn.LayerNorm(8)
        self.mlp = TimmMlp(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TorchvisionBlock(nn.Module):
    """The structure of torchvision's EncoderBlock: nn.MultiheadAttention and a Sequential MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8), nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.self_attention(x, x, x, need_weights=False)
        out: Tensor = x + mixed + self.mlp(x + mixed)
        return out


class TokenClassifier(nn.Module):
    """Blocks over tokens [N, T, 8] and a head on their mean."""

    def __init__(self, block: type[nn.Module], depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.head = nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean(1))
        return out


def small_cnn() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 4, 3, padding=1),
            act1=nn.GELU(),
            conv2=nn.Conv2d(4, 5, 3, stride=2, padding=1, dilation=2),
            act2=nn.ReLU(),
            flat=nn.Flatten(),
            head=nn.Linear(5 * 3 * 3, 4),
        )
    ).double()


def batches(model: nn.Module, count: int, size: int = 5, seed: int = 1) -> Batches:
    shape = (6, 8) if isinstance(model, TokenClassifier) else (3, 8, 8)
    return random_batches(model, count, size, shape, classes=4, seed=seed)


def grow_once(
    scaling: NeuronScaling,
    budget: int,
    optimizer: torch.optim.Optimizer | None = None,
    init: str = "parent",
) -> int:
    """Grow on recorded batches; how many parameters were added."""
    data = batches(scaling.model, 2)
    record(scaling, data)
    chosen = scaling.select(scaling.scores(), budget, min_eligible=1)
    scaling.grow(chosen, optimizer, init=init, sample=data[0][0])
    return chosen.parameters


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def assert_repeats(
    record: dict[str, Any],
    saved: tuple[dict[str, Any], dict[str, Any]],
    base: nn.Module,
    model: nn.Module,
) -> None:
    """Of what was saved before a growth its record makes the grown model's bits; rebuild repeats.

    Args:
        record: of the growth.
        saved: states of the model and of the optimizer before it.
        base: a copy of the model before it.
        model: grown.
    """
    grown, _ = grow_state(record, *saved, build=lambda: copy.deepcopy(base))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(grown[name], value, rtol=0, atol=0)
    twin = copy.deepcopy(base)
    rebuild(twin, insertions(model))
    twin.load_state_dict(model.state_dict())
