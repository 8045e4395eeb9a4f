"""Gradients of the coefficients keep their digits whatever bias was added to the maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import growkernels as gk

KERNELS = {"3 x 3": (3, 1), "1 x 1": (1, 0)}
BIASES = {
    torch.float32: (0.0, 1.0, 4.0, 16.0, 256.0, 1e4),
    torch.bfloat16: (0.0, 1.0, 4.0, 16.0, 64.0),
    torch.float16: (0.0, 1.0, 4.0, 256.0, 4096.0),
}
CASES = [(dtype, bias) for dtype, biases in BIASES.items() for bias in biases]


def composed(x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor, padding: int) -> Tensor:
    z = F.conv2d(x, basis, padding=padding)
    return torch.cat([z, F.conv2d(z, coeff[:, :, None, None])], 1) + bias[:, None, None]


def tensors(kernel: int, dtype: torch.dtype, bias: float) -> tuple[list[Tensor], Tensor]:
    """x, basis, coeff and bias, with maps of order 1, and the gradient of y."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = randn(4, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    basis = randn(8, 16, kernel, kernel) / (4 * kernel)
    offsets = bias * (1 + 0.1 * torch.rand(24, generator=generator))
    given = [t.to(dtype) for t in (x, basis, randn(16, 8) / 3, offsets)]
    return given, randn(4, 24, 16, 16).to(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "bias"), CASES)
def test_no_digits_are_lost(kernel: str, dtype: torch.dtype, bias: float) -> None:
    size, padding = KERNELS[kernel]
    given, grad = tensors(size, dtype, bias)
    exact = [t.double().requires_grad_() for t in given]
    (oracle,) = torch.autograd.grad(
        composed(*exact, padding=padding), exact[2], grad.double()  # type: ignore[misc]
    )  # fmt: skip

    def error(gradient: Tensor) -> float:
        return float((gradient - oracle).norm() / oracle.norm())

    leaves = [t.clone().requires_grad_() for t in given]
    ours = error(torch.autograd.grad(gk.basis_conv2d(*leaves, padding=padding), leaves[2], grad)[0])
    theirs = error(
        torch.autograd.grad(composed(*leaves, padding=padding), leaves[2], grad)[0]  # type: ignore[misc]
    )
    assert ours <= 2 * theirs + 2e-6 * (dtype == torch.float32), (ours, theirs)


def test_second_derivatives_keep_their_digits() -> None:
    given, grad = tensors(3, torch.float32, 1e4)

    def second(convolve: object, arguments: list[Tensor], g: Tensor) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in arguments]
        g = g.clone().requires_grad_()
        y = convolve(*leaves, padding=1)  # type: ignore[operator]
        (dcoeff,) = torch.autograd.grad(y, leaves[2], g, create_graph=True)
        (of_grad,) = torch.autograd.grad(dcoeff.sum(), g)
        return of_grad

    exact = second(composed, [t.double() for t in given], grad.double())
    ours = second(gk.basis_conv2d, given, grad)
    assert (ours - exact).norm() <= 1e-5 * exact.norm()


def test_maps_are_recovered_where_the_bias_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At no cost: the backward pass computes no convolution of the input once more."""
    given, grad = tensors(3, torch.float64, 0.5)
    for bias, convolutions in ((0.5, 0), (1e6, 1)):
        leaves = [t.clone().requires_grad_() for t in given[:3]]
        leaves.append(torch.full((24,), bias, dtype=torch.float64))
        y = gk.basis_conv2d(*leaves, padding=1)
        with torch.profiler.profile() as profile:
            torch.autograd.grad(y, leaves[2], grad)
        counted = [event for event in profile.events() if event.name == "aten::conv2d"]
        assert len(counted) == convolutions, bias


def test_compiled() -> None:
    given, grad = tensors(3, torch.float32, 1e4)
    leaves = [t.clone().requires_grad_() for t in given]

    @torch.compile(fullgraph=True)
    def convolve(*arguments: Tensor) -> Tensor:
        return gk.basis_conv2d(*arguments, padding=1)

    (compiled,) = torch.autograd.grad(convolve(*leaves), leaves[2], grad)
    (eager,) = torch.autograd.grad(gk.basis_conv2d(*leaves, padding=1), leaves[2], grad)
    torch.testing.assert_close(compiled, eager)
