"""The family of splitting matrices on a GPU, against its float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from op_samples import DTYPES, Sample
from op_samples.numbers import relative
from op_samples.splitting import (
    ACTIVATIONS,
    convolution,
    plain_convolution,
    plain_product,
    product,
)
from op_samples.splitting import CONVOLUTIONS as SMALL_CONVOLUTIONS
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import plan, reference
from growkernels.ops.splitting.triton_tiles import FUSED

pytestmark = pytest.mark.gpu

WIDTHS = sorted({tile.width for tiles in FUSED.values() for tile in tiles})
# Every tile of the fused kernel, full and ragged, and rows that are too wide for it.
PRODUCTS = [
    product(1, 1, 1, 1),
    product(300, 70, 2, 33),
    product(1000, 200, 1, 64),
    *(product(777, 131, 1, width) for width in WIDTHS),
    product(1500, 130, 3, 100),
    product(530, 101, 1, 380),
    product(900, 140, 2, 500),
    product(6304, 1536, 1, 384),
]
CONVOLUTIONS = [
    *SMALL_CONVOLUTIONS[:4],
    convolution((32, 16, 12, 12), (33, 1, 3, 3), 1, 1, 1),
    convolution((16, 64, 16, 16), (64, 1, 3, 3), 1, 1, 1),
    convolution((8, 96, 8, 8), (70, 2, 3, 3), 1, 1, 1),
]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


# Of roundings, beside an error of plain torch that may be next to nothing.
SLACK = {torch.float64: 16.0, torch.float32: 2.0, torch.bfloat16: 0.5, torch.float16: 0.5}


def check(actual: Tensor, exact: Tensor, plain: Tensor, tf32: bool = False) -> None:
    """An error of at most twice plain torch's, and every element written."""
    assert not actual.isnan().any()
    bound = 2 * relative(plain, exact) + SLACK[actual.dtype] * torch.finfo(actual.dtype).eps
    if tf32:
        # The vendor multiplies some small matrices in full float32. Factors that are cut off
        # instead of rounded make an error of 1e-3, which in a single number may be one of chance.
        bound = max(bound, 7e-4 if actual.numel() > 1 else 2.5e-3)
    assert relative(actual, exact) <= bound


@pytest.fixture
def set_tf32() -> Iterator[Callable[[bool], None]]:
    before = torch.get_float32_matmul_precision()

    def allow(allowed: bool) -> None:
        torch.set_float32_matmul_precision("high" if allowed else "highest")

    yield allow
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("dtype", "tf32"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True)], ids=str
)
@pytest.mark.parametrize("sample", PRODUCTS, ids=str)
def test_error_is_at_most_twice_plain_torch(
    sample: Sample,
    dtype: torch.dtype,
    tf32: bool,
    set_tf32: Callable[[bool], None],
) -> None:
    set_tf32(tf32)
    x, w, v = sample.tensors(dtype, "cuda")
    actual = gk.splitting_hvp(x, w, v)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    exact = reference.splitting_hvp(x.double(), w.double(), v.double())
    check(actual, exact, plain_product(x, w, v), tf32)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", CONVOLUTIONS, ids=str)
def test_conv_error_is_at_most_twice_plain_torch(
    sample: Sample, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x, w, v = sample.tensors(dtype, "cuda")
    x, w = (t.contiguous(memory_format=memory_format) for t in (x, w))
    actual = gk.splitting_hvp_conv2d(x, w, v, **sample.arguments)
    assert actual.is_contiguous()
    exact = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), **sample.arguments)
    check(actual, exact, plain_convolution(x, w, v, **sample.arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight(name: str, dtype: torch.dtype) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    z = 3 * randn(5, 8, 17, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for grad in (randn(5, 8, 17, 9, dtype=dtype), randn(5, 8, 9, 17, dtype=dtype).mT):
        actual = gk.splitting_weight(grad, z, activation, beta=beta)
        assert actual.stride() == z.stride()
        exact = reference.splitting_weight(grad.double(), z.double(), activation, beta=beta)
        check(actual, exact, reference.splitting_weight(grad, z, activation, beta=beta))


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    x, w, v = product(6304, 200, 2, 96).tensors(dtype, "cuda")
    wide = product(3000, 200, 1, 500).tensors(dtype, "cuda")
    images, sliding = CONVOLUTIONS[-1].tensors(dtype, "cuda"), CONVOLUTIONS[-1].arguments
    return {
        "fused": lambda: gk.splitting_hvp(x, w, v),
        "projected": lambda: gk.splitting_hvp(*wide),
        "convolution": lambda: gk.splitting_hvp_conv2d(*images, **sliding),
        "weight": lambda: gk.splitting_weight(w, w),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fused", "projected", "convolution", "weight"])
def test_same_bits_without_waiting_and_in_a_graph(
    name: str,
    dtype: torch.dtype,
    no_host_sync: Callable[[], AbstractContextManager[None]],
    replayed: Callable[[Callable[[], Any]], Any],
) -> None:
    call = calls(dtype)[name]
    first = call()
    with no_host_sync():
        second = call()
    assert first.equal(second)
    assert replayed(call).equal(first)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_come_through(bad: float) -> None:
    x, w, v = product(500, 40, 1, 48).tensors(torch.bfloat16, "cuda")
    w[123, 7] = bad
    y = gk.splitting_hvp(x, w, v)
    assert not y[7].isfinite().any()
    assert y[:7].isfinite().all()
    assert y[8:].isfinite().all()


def test_gradients() -> None:
    arguments = [t.requires_grad_() for t in product(9, 3, 2, 5).tensors(torch.float64, "cuda")]
    assert torch.autograd.gradcheck(gk.splitting_hvp, arguments)
    tensors = product(400, 30, 1, 64).tensors(torch.bfloat16, "cuda")
    x, w, v = (t.requires_grad_() for t in tensors)
    gk.splitting_hvp(x, w, v).float().square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, w, v))


def test_images_beyond_32_bit_offsets() -> None:
    """2^31 elements and more of x: the last samples count."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    rows, width = 2**23 + 64, 256
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    w = torch.zeros(rows, 8, dtype=torch.bfloat16, device="cuda")
    tail = randn(64, width, dtype=torch.bfloat16)
    x[-64:], w[-64:] = tail, randn(64, 8, dtype=torch.bfloat16)
    v = randn(8, width, dtype=torch.bfloat16)
    torch.testing.assert_close(
        gk.splitting_hvp(x, w, v), gk.splitting_hvp(tail, w[-64:], v), rtol=2e-2, atol=1e-1
    )


def test_triton_is_what_runs() -> None:
    for width, backend in ((384, "fused"), (768, "projected")):
        shapes = ((50432, width), (50432, 8), (8, width))
        x, w, v = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        assert plan.plan_hvp(x, w, v).backend == backend
        assert plan.plan_weight(w).backend == "triton"
