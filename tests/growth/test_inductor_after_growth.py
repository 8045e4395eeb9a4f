"""Grown models in torch.compile's own backend, which makes code of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import LayerInsertion, NeuronScaling


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1, self.act, self.fc2 = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.embed(x))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h)
        return out


def grown(x: Tensor) -> Model:
    """A block, a layer behind the relu that the forward calls, and neurons beside all others."""
    torch.manual_seed(0)
    model = Model()
    for name in ("blocks.0", "embed"):
        inserter = LayerInsertion(model, sample=x)
        with inserter.recording():
            model(x).square().mean().backward()
        inserter.insert(name)
        inserter.close()
    scaling = NeuronScaling(model, "random", layers=["blocks.*.fc1"])
    with scaling.recording():
        model(x).square().mean().backward()
    scaling.grow(scaling.select(scaling.scores(), budget=200, min_eligible=1))
    scaling.close()
    return model


def test_outputs_and_gradients_are_those_without() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    model = grown(x)
    parameters = list(model.parameters())
    expected = model(x)
    grads = torch.autograd.grad(expected.square().mean(), parameters)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    found = compiled(x)
    assert torch.allclose(found, expected, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().mean(), parameters), grads, strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)
