"""Models that torch.compile holds: they compile anew after each growth, as often as they grow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import BasisConv2d, convert, separate_attention

INSERTION = {"kind": "linear_relu", "position": "body.1", "width": 4, "activation": "tanh"}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


class Counting:
    """A backend that runs what it gets and counts how often it gets something."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("how", ["one wrapper", "a new wrapper", "in place"])
def test_twelve_growths_compile_twelve_times(how: str) -> None:
    torch.compiler.reset()
    model, backend = Network(), Counting()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(3, 4)
    expected = model(x)
    for number in range(12):
        if how == "in place":
            model.compile(backend=backend)
        elif how == "a new wrapper":
            compiled = torch.compile(model, backend=backend)
        y = model(x) if how == "in place" else compiled(x)
        torch.testing.assert_close(y, expected)
        assert backend.graphs == number + 1
        rebuild(model, {**INSERTION, "scale": 0.8})
    torch.compiler.reset()


def test_exchanges_take_the_compiled_model() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(1, 2, 5, 5)
    compiled(x)
    assert set(convert(compiled, {"0": 1}).converted) == {"0"}
    assert isinstance(model[0], BasisConv2d)
    assert [record["kind"] for record in insertions(model)] == ["conversion"]
    torch.testing.assert_close(compiled(x), model(x))
    attending = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, batch_first=True)})
    assert separate_attention(torch.compile(attending)).exchanged == ("a",)
    fresh = torch.compile(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), backend="eager")
    rebuild(fresh, insertions(model))
    assert insertions(fresh) == insertions(model)
    torch.compiler.reset()


@pytest.mark.parametrize("driver", [LayerInsertion, NeuronScaling])
def test_the_advice_of_a_refusal_applies(driver: Any) -> None:
    whole, part, in_place = Network(), Network(), Network()
    compiled = torch.compile(whole, backend="eager")
    with pytest.raises(TypeError, match=r"The model is compiled.*pass the plain module"):
        driver(compiled)
    driver(compiled._orig_mod).close()
    part.body = torch.compile(part.body, backend="eager")
    with pytest.raises(TypeError, match=r"Module 'body' is compiled.*\(its \._orig_mod\)"):
        driver(part)
    part.body = part.body._orig_mod
    driver(part).close()
    in_place.body.compile(backend="eager")
    with pytest.raises(TypeError, match=r"Module 'body' is compiled in place.*_compiled_call_impl"):
        driver(in_place)
    driver(copy.deepcopy(in_place)).close()  # a copy is not compiled
    in_place.body._compiled_call_impl = None
    driver(in_place).close()
