"""Wide layers of few rows or neurons, whose products may be the vendor's: right in any layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import plan, reference

ops = torch.ops.growkernels
# Rows, neurons, vectors of each, features: on both sides of every limit.
SHAPES = [
    (40, 256, 1, 256), (7, 300, 2, 257), (40, 255, 1, 300), (40, 300, 1, 255), (1025, 256, 1, 256),
    (1025, 257, 1, 256), (1025, 256, 2, 511), (4097, 256, 1, 256), (4097, 512, 1, 192),
    (40, 511, 1, 192), (40, 512, 1, 191), (40, 512, 2, 192),
    (1, 256, 1, 256), (0, 256, 1, 256),
]  # fmt: skip


def drawn(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1) if transposed else tensor


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "neurons", "k", "width"), SHAPES)
def test_products_are_right_and_what_the_plan_says(
    rows: int, neurons: int, k: int, width: int, dtype: torch.dtype, transposed: bool
) -> None:
    x, w, v = (
        drawn(shape, dtype, transposed)
        for shape in ((rows, width), (rows, neurons), (neurons, k, width))
    )
    ops.kernels_ran()
    y = gk.splitting_hvp(x, w, v)
    chosen = plan.plan_hvp(x, w, v).backend
    assert ops.kernels_ran() == ([chosen] if rows or chosen == "vendor's product" else [])
    wide = min(neurons, width) >= 192 and dtype != torch.bfloat16
    assert wide or chosen != "vendor's product"
    exact = reference.splitting_hvp(x.double(), w.double(), v.double())
    bound = reference.splitting_hvp(*(part.double().abs() for part in (x, w, v)))
    rounding = (rows + width + 8) * torch.finfo(torch.float32).eps if dtype != torch.float64 else 0
    rounding += 2 * torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 else rows + width)
    assert ((y - exact).abs() <= rounding * bound).all()
    assert y.is_contiguous()
