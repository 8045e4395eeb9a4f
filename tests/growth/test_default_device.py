"""Nothing is made on torch's default device by accident: here it is one that holds no values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import BasisSearch, LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import BasisConv2d, convert, separate_attention


def network() -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 4, 4, generator=generator, device="cpu")
    return x, torch.arange(5, device="cpu") % 3


@pytest.fixture(autouse=True)
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("criterion", ["splitting", "s2d", "gradient_sum", "magnitude", "random"])
@pytest.mark.parametrize("generator", [None, torch.Generator("cpu")])
def test_neuron_scaling(criterion: str, generator: torch.Generator | None) -> None:
    model = network()
    x, y = batch()
    scaling = NeuronScaling(
        model,
        criterion,
        kinds=("linear", "conv2d"),
        rows=8,
        relu_beta=3.0,
        generator=generator,
        widen=("fc1",),
        form="gated",
    )
    with scaling.recording():
        F.cross_entropy(model(x), y).backward()
    optimizer = torch.optim.Adam(model.parameters())
    chosen = scaling.select(scaling.scores(), budget=1000, min_eligible=1)
    scaling.grow(chosen, optimizer, sample=x)
    base = network()
    rebuild(base, insertions(model))
    base.load_state_dict(model.state_dict())
    torch.testing.assert_close(base(x), model(x))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("norm", ["frobenius", "frobenius_scaled", "operator"])
def test_layer_insertion(norm: str) -> None:
    model = network()
    x, y = batch()
    inserter = LayerInsertion(model, norm=norm)
    for _ in range(2):
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
    for position in ("1", "4"):
        inserter.merits()
        inserter.insert(position if position == "1" else "5", sample=x)
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("init", ["svd", "select"])
def test_search_and_exchange(init: str) -> None:
    model = network()
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    search = BasisSearch(model, (0.25,))
    costs = search.sensitivities("taylor", batches=[(x, y)])
    search.sensitivities("train", train=lambda trained, generator: float(trained(x).mean()))
    plan = search.plan(costs, search.times(x, rounds=1), max_cost=1e9)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    convert(model, plan or {"0": 2}, optimizer, init)
    assert isinstance(model[0], BasisConv2d)
    convert(model, {"0": 1.0}, optimizer)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_attention() -> None:
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True))
    separate_attention(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
