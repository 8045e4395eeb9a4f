"""Splitting matrices at the ends of a dtype's range, and of memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import reference

FAR_APART = """
import torch, growkernels as gk
stride, d, n = 2**27 + 3, 5, 3
x = torch.empty(stride + d).as_strided((2, d), (stride, 1))  # two pages of it are touched
generator = torch.Generator().manual_seed(0)
x.copy_(torch.randn(2, d, generator=generator))
w, v = torch.randn(2, n, generator=generator), torch.randn(n, d, generator=generator)
torch.testing.assert_close(gk.splitting_hvp(x, w, v), gk.splitting_hvp(x.contiguous(), w, v))
"""


def test_rows_far_apart() -> None:
    subprocess.run([sys.executable, "-c", FAR_APART], check=True)


def leaves_of(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("convolution", [False, True])
def test_float16_gradients_stay_finite_where_the_result_does(convolution: bool) -> None:
    """Products of rows and vectors are beyond 65504, and small weights bring them back."""
    generator = torch.Generator().manual_seed(0)

    def positive(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).half()

    if convolution:
        given = [40 * positive(2, 8, 6, 6), 1e-4 * positive(2, 3, 6, 6), 40 * positive(3, 8, 3, 3)]
        ours, oracle = gk.splitting_hvp_conv2d, reference.splitting_hvp_conv2d
        sliding = {"padding": 1}
    else:
        given = [30 * positive(16, 100), 1e-4 * positive(16, 3), 30 * positive(3, 100)]
        ours, oracle = gk.splitting_hvp, reference.splitting_hvp
        sliding = {}
    half, exact = leaves_of(given, torch.float16), leaves_of(given, torch.float64)
    y = ours(*half, **sliding)  # type: ignore[arg-type]
    expected = oracle(*exact, **sliding)  # type: ignore[arg-type]
    assert y.isfinite().all()
    grad = torch.full_like(y, 7.5e-5)
    gradients = torch.autograd.grad(y, half, grad)
    of_oracle = torch.autograd.grad(expected, exact, grad.double())
    for mine, theirs in zip(gradients, of_oracle, strict=True):
        assert mine.dtype == torch.float16
        assert theirs.abs().max() < 65504
        assert (mine - theirs).norm() <= 2e-3 * theirs.norm()


def test_float16_products_composed_of_torch_s_ops() -> None:
    """Forward mode takes the composed form."""
    x, v = torch.full((4, 100), 30.0).half(), torch.full((2, 100), 30.0).half()
    w = torch.full((4, 2), 1e-4).half()
    _, tangent = torch.func.jvp(lambda t: gk.splitting_hvp(t, w, v), (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tanh_of_nan_is_nan_and_of_infinity_one(dtype: torch.dtype) -> None:
    h = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, 1.0]], dtype=dtype)
    (gradient,) = gk.virtual_grads([h], [torch.ones_like(h)], "residual")
    expected = torch.tanh(h.double())[0]
    for row in gradient:
        torch.testing.assert_close(
            row.double(), expected, rtol=1e-2, atol=0, equal_nan=True
        )  # fmt: skip
