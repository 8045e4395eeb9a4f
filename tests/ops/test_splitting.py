"""What is special about splitting matrices; the rest is in test_contract_*.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from op_samples import DTYPES
from op_samples.splitting import ACTIVATIONS, CONVOLUTIONS, product
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import reference


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_is_the_second_derivative_by_autograd(name: str) -> None:
    activation, beta, function = ACTIVATIONS[name]
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    grad = randn(*z.shape, dtype=torch.float64)
    actual = gk.splitting_weight(grad, z.detach(), activation, beta=beta)
    torch.testing.assert_close(actual, grad * second, rtol=1e-9, atol=1e-12)
    oracle = reference.splitting_weight(grad, z.detach(), activation, beta=beta)
    torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_keeps_the_layout_of_the_preactivations(name: str) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    z = randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    grad = randn(2, 5, 4, 3, seed=1).transpose(2, 3)
    actual = gk.splitting_weight(grad, z, activation, beta=beta)
    assert actual.stride() == z.stride()
    plain = gk.splitting_weight(grad.contiguous(), z.contiguous(), activation, beta=beta)
    torch.testing.assert_close(actual, plain)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_in_the_tails(name: str) -> None:
    """Curvature dies out on both sides: tiny values come out tiny, with the right relative size."""
    activation, beta, _ = ACTIVATIONS[name]
    z = torch.tensor([-1e4, -200.0, -60.0, -11.0, 11.0, 60.0, 200.0, 1e4, float("nan")])
    actual = gk.splitting_weight(torch.ones(9), z, activation, beta=beta)
    assert actual[-1].isnan()
    assert (actual[[0, 7]] == 0).all()
    # 1 - sigmoid cancels for large z; its mirror image does not.
    exact = z.double()
    mirrored = reference.second_derivative(-exact.abs(), activation, beta)
    even = activation in ("gelu", "gelu_tanh", "silu", "softplus", "relu")
    expected = mirrored if even else mirrored * -exact.sign()
    if (
        activation != "gelu_tanh" and activation != "tanh"
    ):  # the oracle itself cancels in their tails
        torch.testing.assert_close(actual[:-1], expected[:-1].float(), rtol=2e-4, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_of_huge_preactivations_is_zero(name: str, dtype: torch.dtype) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    largest = torch.finfo(dtype).max
    z = torch.tensor([-largest, -torch.inf, torch.inf, largest], dtype=dtype).repeat(16)
    grad = torch.ones_like(z).requires_grad_()
    for preact in (z, z.clone().requires_grad_()):
        weight = gk.splitting_weight(grad, preact, activation, beta=beta)
        assert weight.eq(0).all()
    for gradient in torch.autograd.grad(weight.sum(), (grad, preact)):
        assert gradient.eq(0).all()


# --- the mathematics, from a network that exists


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_is_the_hessian_of_a_split_by_double_backward(name: str) -> None:
    """Wu et al.: halving a neuron, its copies moved by +d and -d, changes the loss by d^T S d / 2.

    The loss after the split is differentiated twice at d = 0 by autograd, for every neuron.
    """
    activation, beta, function = ACTIVATIONS[name]
    samples, width, neurons = 6, 4, 3
    x = randn(samples, width, dtype=torch.float64)
    weight = randn(neurons, width, dtype=torch.float64, seed=1)
    outer = randn(2, neurons, dtype=torch.float64, seed=2)
    target = randn(samples, 2, dtype=torch.float64, seed=3)

    def loss(activations: Tensor) -> Tensor:
        return (torch.tanh(activations @ outer.T) - target).square().sum()

    def split(d: Tensor) -> Tensor:
        return loss((function(x @ (weight + d).T) + function(x @ (weight - d).T)) / 2)

    v = randn(neurons, width, dtype=torch.float64, seed=4)
    d = torch.zeros_like(weight).requires_grad_()
    (slope,) = torch.autograd.grad(split(d), d, create_graph=True)
    rows = [
        torch.autograd.grad((slope[i] * v[i]).sum(), d, retain_graph=True)[0][i]
        for i in range(neurons)
    ]
    expected = torch.stack(rows)

    preact = x @ weight.T
    hidden = function(preact).requires_grad_()
    (grad,) = torch.autograd.grad(loss(hidden), hidden)
    w = gk.splitting_weight(grad, preact, activation, beta=beta)
    torch.testing.assert_close(gk.splitting_hvp(x, w, v), expected, rtol=1e-9, atol=1e-10)


def test_conv_is_the_gradient_of_a_dummy_parameter() -> None:
    """S_i as S2D's authors get it: dL/dV of act''(z) p^T V p added to the neuron's output."""
    x, w, v = CONVOLUTIONS[1].tensors(torch.float64)
    columns = F.unfold(x, v.shape[-2:], dilation=(1, 2), padding=(0, 2), stride=(2, 1))  # [N, D, L]
    for neuron in range(v.shape[0]):
        V = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64).requires_grad_()
        term = torch.einsum("nal,ab,nbl->nl", columns, V, columns)
        (S,) = torch.autograd.grad((term * w[:, neuron].flatten(1)).sum(), V)
        expected = (v[neuron].flatten(1) @ S).view(v[neuron].shape)
        actual = gk.splitting_hvp_conv2d(x, w, v, **CONVOLUTIONS[1].arguments)[neuron]
        torch.testing.assert_close(actual, expected)


def test_several_vectors_equal_one_after_the_other() -> None:
    x, w, v = product(700, 90, 3, 40).tensors(torch.float64)
    together = gk.splitting_hvp(x, w, v)
    for q in range(3):
        torch.testing.assert_close(together[:, q], gk.splitting_hvp(x, w, v[:, q]))


BACKEND_PROGRAM = """
import torch
import growkernels as gk
from growkernels.ops.splitting import reference
assert torch.ops.growkernels.bfloat16_tiles() != "amx"
generator = torch.Generator().manual_seed(0)
def randn(*shape):
    return torch.randn(shape, generator=generator)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-14)):
    for rows, n, d in ((450, 7, 5), (300, 131, 61), (129, 40, 401)):
        tensors = [t.to(dtype) for t in (randn(rows, d), randn(rows, n), randn(n, d))]
        y = gk.splitting_hvp(*tensors)
        expected = reference.splitting_hvp(*map(torch.Tensor.double, tensors))
        assert (y - expected).norm() <= tolerance * expected.norm(), (dtype, rows)
    tensors = [t.to(dtype) for t in (randn(3, 4, 6, 5), randn(3, 5, 6, 5), randn(5, 4, 3, 3))]
    y = gk.splitting_hvp_conv2d(*tensors, padding=1)
    expected = reference.splitting_hvp_conv2d(*map(torch.Tensor.double, tensors), padding=1)
    assert (y - expected).norm() <= tolerance * expected.norm(), dtype
"""


@pytest.mark.parametrize("tiles", ["none", "avx512"])
def test_lesser_tiles(tiles: str) -> None:
    environment = {**os.environ, "GROWKERNELS_BFLOAT16_TILES": tiles}
    subprocess.run([sys.executable, "-c", BACKEND_PROGRAM], env=environment, check=True)


def test_extra_memory_is_the_output_and_little_more() -> None:
    """The [M, n] product would take 512 MiB here."""
    program = """
import resource, torch, growkernels as gk
x, w, v = torch.ones(32768, 8), torch.ones(1, 1).expand(32768, 4096), torch.ones(4096, 8)
gk.splitting_hvp(x[:64], w[:64], v)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gk.splitting_hvp(x, w, v)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 64 * 1024, grown
"""
    subprocess.run([sys.executable, "-c", program], check=True)
