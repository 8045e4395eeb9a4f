"""torch.fx traces all layers of this package, and what it traced computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import growkernels as gk
from growkernels.nn import (
    Attention,
    BasisConv2d,
    Conv2dReLU,
    LinearReLU,
    ResidualBlock,
    convert,
    separate_attention,
)
from growkernels.nn.grown_layers import Branch, with_branches


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


def rows() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64)


def grown(layer: nn.Linear | nn.Conv2d, *forms: str) -> nn.Module:
    new = with_branches(layer)
    for number, form in enumerate(forms):
        branch = Branch(layer, [number, 2], form)
        for parameter in branch.parameters():
            nn.init.normal_(parameter)
        new.branches.append(branch)
    return new


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


def separated() -> nn.Module:
    model = nn.Sequential(Attending())
    separate_attention(model)
    return model


def converted() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    convert(model, {"0": 2, "3": 0.5})
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "basis": (lambda: BasisConv2d(3, 6, 3, 2, padding=1, bias=True), images),
    "mixed": (lambda: BasisConv2d(3, 6, 3, 2, stride=2, include_basis=False), images),
    "image": (lambda: BasisConv2d(3, 6, 3, 2), lambda: images()[0]),
    "converted": (converted, images),
    "grown linear": (lambda: grown(nn.Linear(6, 4), "pair", "single", "gated"), rows),
    "grown conv2d": (lambda: grown(nn.Conv2d(3, 4, 3, padding=1), "single", "gated"), images),
    "linear_relu": (lambda: LinearReLU(6, 4), rows),
    "conv2d_relu": (lambda: Conv2dReLU(3, 4, 3), images),
    "residual": (lambda: ResidualBlock(6, "gelu"), rows),
    "attention": (lambda: Attention(6, 2, 4), tokens),
    "separated": (separated, tokens),
}


@pytest.mark.parametrize(("build", "sample"), MODELS.values(), ids=MODELS)
def test_a_traced_model_computes_and_trains_the_same(
    build: Callable[[], nn.Module], sample: Callable[[], Tensor]
) -> None:
    torch.manual_seed(0)
    model = build().double()
    x = sample()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    again = fx.symbolic_trace(traced)
    copied = copy.deepcopy(again)
    expected = model(x)
    expected.square().sum().backward()
    for other in (traced, again, copied):
        torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)
    again(x).square().sum().backward()
    gradients = {name: p.grad for name, p in again.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-10)
    assert fx.symbolic_trace(nn.Sequential(model, nn.ReLU())).graph.nodes


def test_one_trace_takes_images_and_batches() -> None:
    layer = BasisConv2d(3, 6, 3, 2).double()
    traced = fx.symbolic_trace(layer)
    x = images()
    torch.testing.assert_close(traced(x[0]), traced(x)[0])


def test_the_function_is_traced() -> None:
    layer = BasisConv2d(3, 6, 3, 2).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return gk.basis_conv2d(x, self.layer.basis, self.layer.coeff)

    x = images()
    torch.testing.assert_close(fx.symbolic_trace(Net())(x), layer(x))
