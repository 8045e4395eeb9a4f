"""A network that every surgery can be done on, and all of them, for tests of records and states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from growkernels.growth import LayerInsertion, NeuronScaling
from growkernels.nn import convert, separate_attention


class Attending(nn.Module):
    """Self-attention over two tokens of 4 features."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(-1, (2, 4))
        y: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return y.flatten(1)


class Network(nn.Module):
    """Convolutions, attention, and an MLP in an attribute, with a buffer and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        )
        self.attending = Attending()
        self.mlp = nn.Sequential(
            nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 8)
        )
        self.head = nn.Linear(8, 3)
        self.head_again = nn.Linear(8, 3, bias=False)
        self.head_again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x.unflatten(1, (2, 2, 2))).flatten(1)
        y = self.mlp(self.attending(y))
        out: Tensor = self.head(y) + self.head_again(y * y)
        return out


def network(seed: int = 3) -> Network:
    torch.manual_seed(seed)
    return Network()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(6, 8, generator=generator), torch.arange(6) % 3


def outputs(model: nn.Module, grad: bool = False) -> Tensor:
    """In eval mode, where a batch norm computes the same each time."""
    model.eval()
    with torch.set_grad_enabled(grad):
        y: Tensor = model(batch()[0])
    model.train()
    return y


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> list[float]:
    """Losses of steps on one batch."""
    x, y = batch()
    losses: list[float] = []

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        losses.append(float(value.detach()))
        return value

    for _ in range(steps):
        optimizer.step(loss)
    return losses


def inserter_at(model: nn.Module, position: str, kind: str) -> LayerInsertion:
    """One that has recorded the batch."""
    inserter = LayerInsertion(model, {position: kind})
    x, y = batch()
    model.eval()  # so that a batch norm stays as it is
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    model.train()
    model.zero_grad()
    return inserter


def inserted(model: nn.Module, optimizer: Optimizer | None) -> None:
    inserter = inserter_at(model, "mlp.1", "linear_relu")
    inserter.insert("mlp.1", optimizer)
    inserter.close()


def inserted_behind_an_attribute(model: nn.Module, optimizer: Optimizer | None) -> None:
    inserter = inserter_at(model, "attending", "residual")
    inserter.insert("attending", optimizer)
    inserter.close()


def _grown(
    model: nn.Module,
    optimizer: Optimizer | None,
    layers: list[str],
    form: str,
    depth: bool = True,
    widen: tuple[str, ...] = (),
) -> None:
    kinds = ("linear", "conv2d")
    scaling = NeuronScaling(
        model, "magnitude", layers=layers, form=form, depth=depth, widen=widen, kinds=kinds
    )
    chosen = scaling.select(scaling.scores(), budget=60, min_eligible=1)
    scaling.grow(chosen, optimizer)
    scaling.close()


def deepened(model: nn.Module, optimizer: Optimizer | None) -> None:
    _grown(model, optimizer, ["mlp.0", "convs.0"], "gated")


def paired(model: nn.Module, optimizer: Optimizer | None) -> None:
    _grown(model, optimizer, ["mlp.2"], "pair")


def widened(model: nn.Module, optimizer: Optimizer | None) -> None:
    _grown(model, optimizer, ["mlp.0"], "single", depth=False, widen=("fc1",))


def converted(model: nn.Module, optimizer: Optimizer | None) -> None:
    convert(model, {"convs.0": 1, "convs.2": 1}, optimizer)


def converted_back(model: nn.Module, optimizer: Optimizer | None) -> None:
    convert(model, {"convs.0": 1}, optimizer)
    convert(model, {"convs.0": 1.0}, optimizer)


def separated(model: nn.Module, optimizer: Optimizer | None) -> None:
    separate_attention(model, optimizer)


Surgery = Callable[[nn.Module, Optimizer | None], object]
SURGERIES: dict[str, Surgery] = {
    "insert": inserted,
    "insert behind": inserted_behind_an_attribute,
    "widen": widened,
    "deepen": deepened,
    "pair": paired,
    "convert": converted,
    "convert back": converted_back,
    "separate attention": separated,
}


def grown(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """The model after one surgery of each kind, in an order that mixes them."""
    separated(model, optimizer)
    inserted(model, optimizer)
    _grown(model, optimizer, ["mlp.0", "attending.attention.v"], "gated")
    converted(model, optimizer)
    widened(model, optimizer)
    paired(model, optimizer)
    inserted_behind_an_attribute(model, optimizer)
    convert(model, {"convs.0": 1.0}, optimizer)
    return model
