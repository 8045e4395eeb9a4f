"""Predicted decreases of the loss against measured ones, and a budget that criteria share."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import NeuronScaling, share_budget

STEP = 1e-3


def data() -> Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(2)).double()


def network(*, deep: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    more = [nn.Tanh(), nn.Linear(4, 3)] if deep else []
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), *more).double()


def orthogonal_to(rows: Tensor, columns: int) -> Tensor:
    """Targets whose products with all columns of the rows, and with 1, are 0."""
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    targets = torch.randn(len(rows), columns, generator=torch.Generator().manual_seed(5)).double()
    rest: Tensor = targets - rows @ torch.linalg.lstsq(rows, targets, driver="gelsd").solution
    return rest


def wider(model: nn.Module, criterion: str, loss: Callable[[], Tensor]) -> NeuronScaling:
    scaling = NeuronScaling(model, criterion, widen=("fc1",), depth=False, layers=["0"])
    with scaling.recording():
        loss().backward()
    return scaling


def test_gradmax() -> None:
    model = network(deep=True)

    def loss() -> Tensor:
        return F.cross_entropy(model(data()), torch.arange(40) % 3)

    scaling = wider(model, "gradmax", loss)
    scores = scaling.scores()
    predicted = scores.decreases(STEP)["0"]
    scaling.grow(scaling.select(scores, 10**6, 1), init="gradmax")
    model.zero_grad()
    before = loss()
    before.backward()
    gradient = model[0].weight.grad.clone()
    for neuron in range(3):
        moved = copy.deepcopy(model)
        move = STEP * F.normalize(gradient[7 + neuron], dim=0)
        moved[0].weight.data[7 + neuron] -= move
        after = F.cross_entropy(moved(data()), torch.arange(40) % 3)
        decrease = float((before - after).detach())
        assert decrease == pytest.approx(float(predicted[neuron]), rel=0.02)


def test_tiny() -> None:
    """Where the reader can do nothing more, as a loss that is linear in its outputs says."""
    model = network()
    targets = orthogonal_to(model[1](model[0](data())).detach(), 4)

    def loss() -> Tensor:
        return (model(data()) * targets).sum() / 40

    scaling = wider(model, "tiny", loss)
    scores = scaling.scores()
    predicted = scores.decreases(STEP)["0"]
    scale = float(scores.starts["0"].scales(STEP)[0])
    before = float(loss().detach())
    scaling.grow(scaling.select(scores, 10, 1), init="tiny", scale=scale)
    assert model[0].out_features == 8
    new = torch.cat([model[0].weight[7], model[0].bias[7:], model[2].weight[:, 7]])
    assert float(new.detach().norm()) == pytest.approx(STEP, rel=1e-6)
    assert before - float(loss().detach()) == pytest.approx(float(predicted[0]), rel=1e-3)


def test_splitting() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2)).double()
    targets = orthogonal_to(data(), 7)

    def loss(outputs: Tensor) -> Tensor:
        return (outputs * targets).sum() / 40

    scaling = NeuronScaling(model, "splitting", layers=["0"])
    with scaling.recording():
        loss(model[0](data())).backward()
    scores = scaling.scores(tol=1e-9, iters=200)
    predicted = scores.decreases(STEP)["0"]
    outputs = model[0](data()).detach()
    for neuron in range(7):
        z = data() @ (STEP * scores.directions["0"][neuron])
        moved = outputs.clone()
        moved[:, neuron] += F.gelu(z) + z
        decrease = float(loss(outputs) - loss(moved))
        if scores.values["0"][neuron] < 0:
            assert decrease == pytest.approx(float(predicted[neuron]), rel=1e-3)
        else:
            assert predicted[neuron] == 0


def both(model: nn.Module) -> tuple[NeuronScaling, NeuronScaling]:
    branches = NeuronScaling(model, layers=["0", "2"])
    widened = NeuronScaling(model, "gradmax", widen=("fc1",), depth=False, layers=["0", "2"])
    with branches.recording(), widened.recording():
        F.cross_entropy(model(data()), torch.arange(40) % 3).backward()
    return branches, widened


@pytest.mark.parametrize("step", [1e-3, 0.3, 30.0])
def test_one_budget(step: float) -> None:
    model = network(deep=True)
    branches, widened = both(model)
    asked = [(branches, branches.scores()), (widened, widened.scores())]
    optimizer = torch.optim.AdamW(model.parameters())
    before = model(data()).detach()
    count = sum(p.numel() for p in model.parameters())
    chosen = share_budget(asked, 70, step=step)
    # What is left out is worth no more for its price than what is taken, until prices change.
    values = [
        (value / price, kind, name)
        for kind, prices in enumerate(({"0": 6, "2": 8}, {"0": 10, "2": 11}))
        for name, price in prices.items()
        for value in asked[kind][1].decreases(step)[name].tolist()
    ]
    _, kind, name = max(values)
    assert name in chosen[kind].neurons
    assert sum(selection.parameters for selection in chosen) <= 70
    if step == 1e-3:  # what is there at first order comes first
        assert not chosen[0]
        assert chosen[1]
    if step == 30.0:
        assert chosen[0]
    if chosen[0]:
        branches.grow(chosen[0], optimizer)
    if chosen[1]:
        widened.grow(chosen[1], optimizer, init="gradmax")
    torch.testing.assert_close(model(data()).detach(), before, rtol=1e-12, atol=1e-13)
    grown = sum(p.numel() for p in model.parameters()) - count
    assert grown == sum(selection.parameters for selection in chosen)


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "wider_layers.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {
        "model": network(deep=True).float(),
        "batches": [(data().float(), torch.arange(40) % 3)],
        "loss_fn": F.cross_entropy,
    }
    exec(block, names)
    assert any(names["chosen"])


def test_refusals() -> None:
    model = network(deep=True)
    branches, widened = both(model)
    asked = [(branches, branches.scores()), (widened, widened.scores())]
    with pytest.raises(ValueError, match="too small for one neuron"):
        share_budget(asked, 2, step=0.1)
    with pytest.raises(ValueError, match="must be a positive number"):
        share_budget(asked, 100, step=0.0)
    other = both(network(deep=True))[0]
    with pytest.raises(ValueError, match="of several models"):
        share_budget([asked[0], (other, other.scores())], 100, step=0.1)
    plain = NeuronScaling(model, "magnitude")
    with pytest.raises(ValueError, match="predicts no decrease"):
        share_budget([(plain, plain.scores())], 100, step=0.1)
    wide = NeuronScaling(model, widen=("fc1",), depth=False)
    with pytest.raises(ValueError, match="what branches gain"):
        share_budget([(wide, asked[0][1])], 100, step=0.1)
    with pytest.raises(ValueError, match="Nobody asks"):
        share_budget([], 100, step=0.1)
