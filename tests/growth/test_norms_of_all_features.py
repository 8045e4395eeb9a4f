"""New neurons in front of layer and RMS norms, which divide by the size of all features."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import NeuronScaling, grow_state, insertions, rebuild

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(6),
    "layer without bias": lambda: nn.LayerNorm(6, eps=0.1, bias=False),
    "rms": lambda: nn.RMSNorm(6),
    "rms with eps": lambda: nn.RMSNorm(6, eps=0.1),
}


def network(norm: nn.Module, act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    act = nn.GELU() if act is None else act
    model = nn.Sequential(nn.Linear(4, 6), norm, act, nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model.double()


def data() -> Tensor:
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data()), torch.arange(20) % 3).backward()
        optimizer.step()


def scaling_of(model: nn.Module) -> NeuronScaling:
    return NeuronScaling(
        model, "magnitude", widen=("fc1",), depth=False, sample=data(), layers=["0"]
    )


@pytest.mark.parametrize("name", NORMS)
def test_the_function_stays_and_new_neurons_learn(name: str) -> None:
    model = network(NORMS[name]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    base = copy.deepcopy(model)
    for width in (9, 12):  # twice
        before = model(data()).detach()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        scaling = scaling_of(model)
        chosen = scaling.select(scaling.scores(), 40, 1)
        record = scaling.record(chosen, optimizer)
        twin = copy.deepcopy(model)
        scaling.grow(chosen, optimizer, sample=data())
        scaling.close()
        assert model[0].out_features == width
        torch.testing.assert_close(model(data()).detach(), before, rtol=1e-12, atol=1e-13)
        grown, _ = grow_state(record, *saved, build=lambda twin=twin: copy.deepcopy(twin))
        for key, value in model.state_dict().items():
            torch.testing.assert_close(grown[key], value, rtol=0, atol=0)
        optimizer.zero_grad()
        F.cross_entropy(model(data()), torch.arange(20) % 3).backward()
        assert bool(model[0].weight.grad[width - 3 :].any(1).all())
        train(model, optimizer)
    rebuild(base, insertions(model))
    base.load_state_dict(model.state_dict())
    torch.testing.assert_close(base(data()), model(data()), rtol=0, atol=0)


class Behind(nn.Module):
    """A norm of what an activation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5)
        self.c = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.norm(F.gelu(self.a(x)))).tanh())
        return y


class AlongTokens(nn.Module):
    """As many tokens as features, and a norm of the former."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 20), norm, nn.Linear(20, 5)
        self.c, self.d = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x).transpose(0, 1)).transpose(0, 1)
        y: Tensor = self.d(self.c(self.b(h).tanh()).tanh())
        return y


def test_where_it_cannot_be_kept() -> None:
    def reason(model: nn.Module, layer: str) -> str:
        scaling = NeuronScaling(
            model.double(), "magnitude", widen=("fc1",), depth=False, sample=data()
        )
        return scaling.left_out[layer]

    assert "only directly behind a linear layer" in reason(Behind(), "a")
    assert "along another axis" in reason(AlongTokens(nn.LayerNorm(20)), "a")
    assert "along another axis" in reason(AlongTokens(nn.GroupNorm(1, 20)), "a")
    plain = network(nn.LayerNorm(6, elementwise_affine=False))
    assert "no weight of its own" in reason(plain, "0")
    assert "no slope" in reason(network(nn.LayerNorm(6), nn.ReLU()), "0")
    assert "another value" in reason(network(nn.RMSNorm(6), nn.Sigmoid()), "0")

    class OwnNorm(nn.LayerNorm):
        pass

    assert "together" in reason(network(OwnNorm(6)), "0")
    dead = network(nn.LayerNorm(6))
    nn.init.zeros_(dead[3].weight)
    scaling = scaling_of(dead)
    chosen = scaling.select(scaling.scores(), 40, 1)
    with pytest.raises(ValueError, match="would never get a gradient"):
        scaling.grow(chosen)
    assert dead[0].out_features == 6
