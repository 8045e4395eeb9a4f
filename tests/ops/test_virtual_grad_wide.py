"""Wide linear positions, whose products may be the vendor's: among others, in any layout."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from growkernels.ops.virtual_grad import plan as virtual_grad

ops = torch.ops.growkernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Features of inputs and of gradients.
WIDTHS = [
    (256, 512), (512, 256), (300, 601), (255, 600), (600, 64), (256, 511), (5, 600), (191, 600),
    (192, 300),
]  # fmt: skip


def position(inputs: int, outputs: int, dtype: torch.dtype, samples: int = 40) -> list[Tensor]:
    """Rows that lie apart, as those of a part of a wider tensor do."""
    seed = torch.Generator().manual_seed(inputs + outputs)
    wide = torch.randn(samples, inputs + outputs + 3, generator=seed, dtype=torch.float64)
    h, _, g = wide.to(dtype).split([inputs, 3, outputs], 1)
    return [h, g]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_what_ran_is_what_the_plan_says(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    h, g = position(inputs, outputs, dtype)
    chosen = virtual_grad.plan_position(h, "linear", outputs=outputs)
    call = ([h], [g], "linear", "tanh", 1.0)
    sums = ops.virtual_grads(*call)
    for op in (
        partial(ops.virtual_grad_norms, *call),
        partial(ops.virtual_grads, *call),
        partial(ops.accumulate_virtual_grads, *call, sums, None),
    ):
        ops.kernels_ran()
        op()
        assert ops.kernels_ran() == [chosen.backend]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ["linear_relu", "residual"])
@pytest.mark.parametrize(("width", "samples"), [(255, 40), (256, 0), (300, 4100)])
def test_masks_and_activations_of_wide_positions(
    width: int, samples: int, layer: str, dtype: torch.dtype
) -> None:
    """Without AVX-512 they are applied to some thousand rows before the vendor's product."""
    h, g = position(width, width, dtype, samples)
    chosen = virtual_grad.plan_position(h, layer)
    ops.kernels_ran()
    (actual,) = ops.virtual_grads([h], [g], layer, "tanh", 0.5)
    ran = ops.kernels_ran()
    assert ran == ([chosen.backend] if samples or chosen.backend == "vendor's product" else [])
    left, right = g.double(), h.double()
    if layer == "linear_relu":
        left = left * (right > 0)
    else:
        right = (0.5 * right).tanh()
    rounding = torch.finfo(torch.float32).eps * (samples + 8)
    if dtype == torch.bfloat16:
        rounding += 2 * torch.finfo(dtype).eps
    assert ((actual - left.T @ right).abs() <= rounding * (left.abs().T @ right.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_wide_and_narrow_positions_of_one_call(dtype: torch.dtype) -> None:
    cases = [position(*widths, dtype) for widths in WIDTHS] + [position(300, 601, dtype, samples=0)]
    inputs, grads = ([case[i] for case in cases] for i in (0, 1))
    expected = [g.double().T @ h.double() for h, g in cases]
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4, check_dtype=False)
    call = (inputs, grads, "linear", "tanh", 1.0)
    for actual, right in zip(ops.virtual_grads(*call), expected, strict=True):
        assert actual.dtype == dtype
        close(actual, right)
    squares = torch.stack([right.square().sum() for right in expected])
    close(ops.virtual_grad_norms(*call), squares)
    sums = [torch.full_like(right, 0.5, dtype=dtype) for right in expected]
    moments = torch.ones(len(cases), dtype=dtype)
    found = ops.accumulate_virtual_grads(*call, sums, moments)
    for actual, right in zip(sums, expected, strict=True):
        close(actual, right + 0.5)
    close(found, torch.stack([(right + 0.5).square().sum() for right in expected]))
    close(moments, squares + 1)
