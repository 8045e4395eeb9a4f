"""Identity-initialised layers: they are the identity, they learn, they draw no random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from growkernels.nn import Conv2dReLU, LinearReLU, ResidualBlock, identity_layer


def test_linear_relu() -> None:
    layer = identity_layer("linear_relu", 7)
    h = torch.randn(3, 5, 7).relu()
    assert isinstance(layer, LinearReLU)
    assert torch.equal(layer(h), h)
    layer(h).square().sum().backward()
    assert float(layer.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    other = LinearReLU(4, 6)
    x = torch.randn(2, 4)
    torch.testing.assert_close(other(x), F.relu(F.linear(x, other.weight, other.bias)))


def test_conv2d_relu() -> None:
    layer = identity_layer("conv2d_relu", 5)
    h = torch.randn(2, 5, 6, 7).relu()
    assert isinstance(layer, Conv2dReLU)
    torch.testing.assert_close(layer(h), h, rtol=1e-6, atol=0)
    assert layer.weight.count_nonzero() == 5
    x = torch.randn(1, 3, 4, 4)
    other = Conv2dReLU(3, 2, 3)
    torch.testing.assert_close(other(x), F.conv2d(x, other.weight, other.bias).relu())


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu", "sigmoid"])
def test_residual_identity(activation: str) -> None:
    block = identity_layer("residual", 4, activation=activation, scale=0.8)
    assert isinstance(block, ResidualBlock)
    h = torch.randn(6, 4)
    assert torch.equal(block(h), h)
    assert torch.equal(block.linear1.weight, 0.8 * torch.eye(4))
    block(h).square().sum().backward()
    assert float(block.linear2.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(block.linear1.weight.grad.abs().sum()) == 0  # type: ignore[union-attr]


def test_residual_block_formula() -> None:
    block = ResidualBlock(3).double()
    h = torch.randn(5, 3, dtype=torch.float64)
    w1, b = block.linear1.weight, block.linear1.bias
    torch.testing.assert_close(block(h), h + torch.tanh(h @ w1.T + b) @ block.linear2.weight.T)
    assert [name for name, _ in block.named_parameters()] == [
        "linear1.weight",
        "linear1.bias",
        "linear2.weight",
    ]


@pytest.mark.parametrize("kind", ["linear_relu", "conv2d_relu", "residual"])
def test_no_random_numbers_are_drawn(kind: str) -> None:
    state = torch.get_rng_state()
    layer = identity_layer(kind, 3, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.dtype == torch.float64 and p.device.type == "cpu" for p in layer.parameters())
    assert all(p.requires_grad and p.isfinite().all() for p in layer.parameters())
    assert isinstance(layer, nn.Module)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Unknown layer kind 'pool'"):
        identity_layer("pool", 3)
    with pytest.raises(ValueError, match="width is 0"):
        identity_layer("linear_relu", 0)
    with pytest.raises(ValueError, match="Unknown activation 'swish'"):
        ResidualBlock(3, "swish")
