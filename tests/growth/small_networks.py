"""Small networks of the three sorts, and the same networks with identity layers written into them.

The extended networks are the oracle of the merits: plain torch layers, inserted at construction.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import random_batches, record

from growkernels.growth import LayerInsertion
from growkernels.nn import ResidualBlock


def mlp(seed: int = 0, width: int = 5, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, width),
        nn.ReLU(),
        nn.Linear(width, width + 2),
        nn.ReLU(),
        nn.Linear(width + 2, 2),
    ).to(dtype)


def resnet(seed: int = 0, activation: str = "tanh") -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, 3),
        nn.Tanh(),
        ResidualBlock(3, activation),
        ResidualBlock(3, activation),
        nn.Linear(3, 2),
    ).double()


def cnn(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
    return nn.Sequential(features, nn.Flatten(), nn.Linear(6 * 2 * 3, 2)).to(dtype)


def batches(model: nn.Module, count: int, size: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    is_cnn = any(isinstance(m, nn.Conv2d) for m in model.modules())
    return random_batches(model, count, size, (3, 8, 12) if is_cnn else (2,), classes=2, seed=seed)


def recorded(
    model: nn.Module, positions: list[str] | dict[str, str] | None = None, count: int = 1
) -> LayerInsertion:
    """A driver that has seen some batches; the model's .grad is as before."""
    inserter = LayerInsertion(model, positions)
    record(inserter, batches(model, count, 10))
    return inserter


class VirtualResidual(nn.Module):
    def __init__(self, width: int, activation: str, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width, dtype=torch.float64))
        self.activation = {
            "tanh": torch.tanh,
            "relu": F.relu,
            "gelu": F.gelu,
            "silu": F.silu,
            "sigmoid": torch.sigmoid,
        }[activation]
        self.scale = scale

    def forward(self, h: Tensor) -> Tensor:
        return h + self.activation(self.scale * h) @ self.weight.T


def virtual_linear(width: int) -> nn.Sequential:
    layer = nn.Linear(width, width, dtype=torch.float64)
    layer.weight.data = torch.eye(width, dtype=torch.float64)
    layer.bias.data.zero_()
    return nn.Sequential(layer, nn.ReLU())


def virtual_conv(channels: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)
    layer.weight.data.zero_()
    for channel in range(channels):
        layer.weight.data[channel, channel, 1, 1] = 1.0
    layer.bias.data.zero_()
    return nn.Sequential(layer, nn.ReLU())


def extended(model: nn.Sequential, virtual: dict[int, nn.Module]) -> nn.Sequential:
    """A copy of a flat model with a virtual layer behind each of the given children."""
    layers: list[nn.Module] = []
    for index, layer in enumerate(copy.deepcopy(model)):
        layers += [layer, virtual[index]] if index in virtual else [layer]
    return nn.Sequential(*layers)


def mean_gradients(
    network: nn.Module, weights: list[Tensor], data: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Autograd's gradients of the weights, averaged over the batches."""
    sums = [torch.zeros_like(w) for w in weights]
    for x, y in data:
        grads = torch.autograd.grad(F.cross_entropy(network(x), y), weights)
        for total, grad in zip(sums, grads, strict=True):
            total += grad
    return [total / len(data) for total in sums]
