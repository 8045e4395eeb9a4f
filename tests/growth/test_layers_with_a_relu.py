"""Neurons of layers that end in a ReLU of their own grow as those of a layer and a ReLU do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import Conv2dReLU, LinearReLU
from growkernels.nn.grown_layers import GrownConv2dReLU, GrownLinearReLU


def fused() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Conv2dReLU(2, 6, 3), nn.Flatten(), LinearReLU(24, 7), LinearReLU(7, 6), nn.Linear(6, 3)
    ).double()


def apart(model: nn.Sequential) -> nn.Sequential:
    """The same network of torch's layers; relu modules are children without a number's name."""
    plain = nn.Sequential()
    for name, module in model.named_children():
        if isinstance(module, Conv2dReLU | LinearReLU):
            kind = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
            layer = copy.deepcopy(module)
            layer.__class__ = kind
            plain.add_module(name, layer)
            plain.add_module(f"relu{name}", nn.ReLU())
        else:
            plain.add_module(name, copy.deepcopy(module))
    return plain


def images() -> Tensor:
    return torch.randn(9, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()), torch.arange(9) % 3)


@pytest.mark.parametrize("criterion", ["splitting", "gradient_sum", "magnitude"])
@pytest.mark.parametrize("form", ["single", "gated"])
def test_scores_and_growth_are_those_of_a_layer_and_a_relu(criterion: str, form: str) -> None:
    models = [fused()]
    models.append(apart(models[0]))
    before = models[0](images())
    torch.testing.assert_close(models[1](images()), before)
    for model in models:
        scaling = NeuronScaling(
            model,
            criterion,
            layers=["0", "2", "3"],
            kinds=("linear", "conv2d"),
            form=form,
            widen=("fc1",),
            generator=torch.Generator().manual_seed(2),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            with scaling.recording():
                loss(model).backward()
            chosen = scaling.select(scaling.scores(tol=1e-10), budget=400, min_eligible=1)
            scaling.grow(chosen, optimizer, sample=images())
            torch.testing.assert_close(model(images()), before)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    assert type(models[0][0]) is GrownConv2dReLU
    assert type(models[0][2]) is GrownLinearReLU
    torch.testing.assert_close(models[0](images()), models[1](images()), rtol=1e-7, atol=1e-7)
    assert not torch.allclose(models[0](images()), before)


def test_inserted_layers_grow_and_are_rebuilt() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    base = copy.deepcopy(model)
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    inserter = LayerInsertion(model)
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    inserter.insert("1", sample=x)
    inserter.close()
    scaling = NeuronScaling(model, "magnitude", layers=["2"], form="gated")
    scaling.grow(scaling.select(scaling.scores(), budget=60, min_eligible=1), sample=x)
    assert type(model[2]) is GrownLinearReLU
    assert [p.name for p in LayerInsertion(model).positions] == ["1", "2"]
    scaling.close()
    rebuild(base, insertions(model))
    base.load_state_dict(model.state_dict())
    torch.testing.assert_close(base(x), model(x))
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(x), model(x))


def test_a_relu_has_no_curvature_behind_it() -> None:
    """Another activation behind the layer acts on the ReLU's outputs, not on the neurons'."""
    model = nn.Sequential(LinearReLU(4, 5), nn.GELU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2))
    scaling = NeuronScaling(model, "s2d")
    assert scaling.layers == ("2",)
    assert "no activation with a second derivative" in scaling.left_out["0"]
