"""Gradients with fewer rows or columns than a register has lanes; their operands lie in place."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import growkernels as gk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around the lanes of registers of 16, 32 and 64 bytes; and more than a tile has.
SIZES = (1, 2, 5, 8, 9, 16, 17, 50, 400)
PAIRS = [pair for pair in itertools.product(SIZES, SIZES) if min(pair) <= 17]


def positions(
    samples: int, dtype: torch.dtype, gap: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features and gradients with NaN between their rows, and the G of float64 products."""
    generator = torch.Generator().manual_seed(samples)

    def draw(width: int) -> Tensor:
        rows = torch.full((samples, width + gap), torch.nan, dtype=dtype)
        rows[:, :width] = torch.randn(samples, width, generator=generator).to(dtype)
        return rows[:, :width]

    inputs = [draw(width) for width, _ in PAIRS]
    grads = [draw(height) for _, height in PAIRS]
    expected = [g.double().t() @ h.double() for h, g in zip(inputs, grads, strict=True)]
    return inputs, grads, expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "gap"), [(300, 0), (300, 3), (7, 1), (1, 0)])
def test_every_pair_of_widths(samples: int, gap: int, dtype: torch.dtype) -> None:
    inputs, grads, expected = positions(samples, dtype, gap)
    exact = 1e-13 if dtype == torch.float64 else 2e-6
    gradients = gk.virtual_grads(inputs, grads, "linear")
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.shape == wanted.shape
        torch.testing.assert_close(gradient.double(), wanted, rtol=exact, atol=exact * samples)
    squares = torch.stack([wanted.square().sum() for wanted in expected])
    norms = gk.virtual_grad_norms(inputs, grads, "linear")
    torch.testing.assert_close(norms.double(), squares, rtol=4 * exact, atol=0)

    sums = [2 * gradient for gradient in gradients]
    moments = torch.zeros_like(norms)
    of_sums = gk.virtual_grad_norms(inputs, grads, "linear", sums, second_moments=moments)
    for total, gradient in zip(sums, gradients, strict=True):
        torch.testing.assert_close(total, 3 * gradient, rtol=1e-6, atol=exact * samples)
    torch.testing.assert_close(of_sums, 9 * norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments, norms)


@pytest.mark.parametrize("layer", ["linear_relu", "residual"])
@pytest.mark.parametrize("width", SIZES)
def test_masks_and_activations(width: int, layer: str) -> None:
    generator = torch.Generator().manual_seed(width)
    h, g = torch.randn(2, 90, width, generator=generator)
    (gradient,) = gk.virtual_grads([h], [g], layer)
    wide_h, wide_g = h.double(), g.double()
    masked, activated = (wide_g * (wide_h > 0), wide_h) if layer == "linear_relu" else (
        wide_g, wide_h.tanh()
    )  # fmt: skip
    torch.testing.assert_close(gradient.double(), masked.t() @ activated, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_row_and_column() -> None:
    h, g = torch.ones(40, 3), torch.ones(40, 20)
    h[39, 1] = g[5, 7] = torch.nan
    (gradient,) = gk.virtual_grads([h], [g], "linear")
    expected = torch.full((20, 3), 40.0)
    expected[:, 1] = expected[7] = torch.nan
    torch.testing.assert_close(gradient, expected, equal_nan=True)
