"""transformers' Conv1D, whose weight is [inputs, outputs], beside the nn.Linear that it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scaling_networks import assert_repeats
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import NeuronScaling
from growkernels.growth.neuron_scaling import Selection

Conv1D: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Mlp(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 3)
        if transposed:
            for name in ("first", "second"):
                layer = getattr(self, name)
                other = Conv1D(layer.out_features, layer.in_features)
                other.weight = nn.Parameter(layer.weight.detach().T.contiguous())
                other.bias = layer.bias
                setattr(self, name, other)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(F.gelu(self.first(x))).tanh())
        return y


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(30, 5, generator=torch.Generator().manual_seed(1)).double(), (
        torch.arange(30) % 3
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data()[0]), data()[1]).backward()
        optimizer.step()


def chosen_in(
    model: nn.Module, criterion: str, layers: list[str] | None = None
) -> tuple[NeuronScaling, Selection]:
    scaling = NeuronScaling(
        model,
        criterion,
        layers=layers,
        widen=("fc1",),
        depth=False,
        sample=data()[0],
        generator=torch.Generator().manual_seed(0),
    )
    x, y = data()
    with scaling.recording():
        F.cross_entropy(model(x), y).backward()
    return scaling, scaling.select(scaling.scores(), 3 * (5 + 1 + 4), 1)


@pytest.mark.parametrize(
    "criterion", ["magnitude", "random", "splitting", "gradient_sum", "gradmax", "tiny"]
)
def test_it_grows_as_the_linear_layer_does(criterion: str) -> None:
    models = [Mlp(False), Mlp(True)]
    found = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        train(model, optimizer)
        scaling, chosen = chosen_in(model, criterion, ["first"])
        found.append(chosen)
        before = model(data()[0]).detach()
        init = criterion if criterion in ("gradmax", "tiny") else "parent"
        kept = {} if criterion == "tiny" else {"sample": data()[0]}
        scaling.grow(chosen, optimizer, init=init, **kept)  # type: ignore[arg-type]
        scaling.close()
        if criterion != "tiny":
            torch.testing.assert_close(model(data()[0]).detach(), before, rtol=1e-12, atol=1e-13)
        train(model, optimizer)
    plain, transposed = models
    assert found[0].neurons == found[1].neurons
    assert len(found[0].neurons["first"]) == 3
    assert found[0].parameters == found[1].parameters == 30
    torch.testing.assert_close(found[0].scores.values, found[1].scores.values)
    assert (transposed.first.nf, transposed.second.nx) == (10, 10)
    product = plain.second.weight @ plain.first.weight
    other = transposed.second.weight.T @ transposed.first.weight.T
    torch.testing.assert_close(product, other, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(plain(data()[0]), transposed(data()[0]), rtol=1e-6, atol=1e-9)


def test_records_states_and_optimizer_state() -> None:
    model = Mlp(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    base = copy.deepcopy(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scaling, chosen = chosen_in(model, "gradmax")
    resumed = NeuronScaling(model, "gradmax", widen=("fc1",), depth=False, sample=data()[0])
    resumed.load_state_dict(scaling.state_dict())
    torch.testing.assert_close(resumed.scores().values, chosen.scores.values)
    record = scaling.record(chosen, optimizer, init="gradmax")
    scaling.grow(chosen, optimizer, init="gradmax")
    new = len(chosen.neurons["first"])
    moments = optimizer.state[model.first.weight]["exp_avg_sq"]
    torch.testing.assert_close(moments[:, 7:], moments[:, :7].mean(1, keepdim=True).expand(5, new))
    assert_repeats(record, saved, base, model)


def test_it_has_no_branches() -> None:
    scaling = NeuronScaling(Mlp(True), "magnitude", layers=["head"])
    assert "has no branches" in scaling.left_out["first"]
