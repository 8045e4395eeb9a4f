"""The family of splitting matrices on a GPU, against its float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import plan, reference
from growkernels.ops.splitting.triton_tiles import FUSED

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS: list[tuple[str, float | None]] = [
    ("gelu", None), ("gelu_tanh", None), ("silu", None), ("tanh", None), ("sigmoid", None),
    ("softplus", 0.7), ("relu", 3.0),
]  # fmt: skip
# (M, n, k, d): every tile of the fused kernel, full and ragged, and rows that are too wide for it.
SHAPES = [
    (1, 1, 1, 1),
    (300, 70, 2, 33),
    (1000, 200, 1, 64),
    *((777, 131, 1, width) for width in sorted({t.width for ts in FUSED.values() for t in ts})),
    (1500, 130, 3, 100),
    (530, 101, 1, 380),
    (900, 140, 2, 500),
    (6304, 1536, 1, 384),
]
# (N, C, H, W), (n, k, kh, kw), stride, padding, dilation
CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], Any, Any, Any]] = [
    ((2, 3, 5, 6), (4, 1, 3, 3), 1, 1, 1),
    ((3, 8, 9, 7), (5, 2, 3, 2), (2, 1), (0, 2), (1, 2)),
    ((2, 4, 4, 4), (3, 1, 1, 1), 1, 0, 1),
    ((2, 4, 5, 4), (3, 1, 1, 1), 2, 1, 1),
    ((32, 16, 12, 12), (33, 1, 3, 3), 1, 1, 1),
    ((16, 64, 16, 16), (64, 1, 3, 3), 1, 1, 1),
    ((8, 96, 8, 8), (70, 2, 3, 3), 1, 1, 1),
]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, n, k, width = shape
    v = randn(n, k, width, dtype=dtype)
    return randn(rows, width, dtype=dtype), randn(rows, n, dtype=dtype), v if k > 1 else v[:, 0]


def make_conv(case: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    shape, (n, k, kh, kw), *sliding = case
    x, v = randn(*shape, dtype=dtype), randn(n, k, shape[1], kh, kw, dtype=dtype)
    size = F.conv2d(x.float(), v[:, 0].float(), None, *sliding).shape
    return x, randn(*size, dtype=dtype), v if k > 1 else v[:, 0], tuple(sliding)


def plain_torch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    vectors = v.reshape(-1, v.shape[-1])
    k = v.shape[1] if v.dim() == 3 else 1
    return (((x @ vectors.T) * w.repeat_interleave(k, 1)).T @ x).view(v.shape)


def plain_conv(x: Tensor, w: Tensor, v: Tensor, sliding: tuple[Any, ...]) -> Tensor:
    filters = v.reshape(-1, *v.shape[-3:])
    products = F.conv2d(x, filters, None, *sliding)
    products *= w.repeat_interleave(len(filters) // w.shape[1], 1)
    return torch.nn.grad.conv2d_weight(x, list(filters.shape), products, *sliding).view(v.shape)


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


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
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_plain_torch(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    tf32: bool,
    set_tf32: Callable[[bool], None],
) -> None:
    set_tf32(tf32)
    x, w, v = make(shape, dtype)
    actual = gk.splitting_hvp(x, w, v)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    exact = reference.splitting_hvp(x.double(), w.double(), v.double())
    check(actual, exact, plain_torch(x, w, v), tf32)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv_error_is_at_most_twice_plain_torch(
    case: Any, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x, w, v, sliding = make_conv(case, dtype)
    x, w = (t.contiguous(memory_format=memory_format) for t in (x, w))
    actual = gk.splitting_hvp_conv2d(x, w, v, *sliding)
    assert actual.is_contiguous()
    exact = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), *sliding)
    check(actual, exact, plain_conv(x, w, v, sliding))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "beta"), ACTIVATIONS)
def test_weight(activation: str, beta: float | None, dtype: torch.dtype) -> None:
    z = 3 * randn(5, 8, 17, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for grad in (randn(5, 8, 17, 9, dtype=dtype), randn(5, 8, 9, 17, dtype=dtype).mT):
        actual = gk.splitting_weight(grad, z, activation, beta=beta)
        assert actual.stride() == z.stride()
        exact = reference.splitting_weight(grad.double(), z.double(), activation, beta=beta)
        check(actual, exact, reference.splitting_weight(grad, z, activation, beta=beta))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    x, w, v = make((300, 70, 2, 33), dtype)
    expected = gk.splitting_hvp(x, w, v)
    tolerance = 8 * torch.finfo(dtype).eps
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, w, v)]
    every_other = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, w, v)]
    for arguments in (turned, every_other):
        assert relative(gk.splitting_hvp(*arguments), expected.double()) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_zero_sizes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, width, n = sizes
    shapes = ((rows, width), (rows, n), (n, width))
    x, w, v = (torch.ones(shape, dtype=dtype, device="cuda") for shape in shapes)
    assert gk.splitting_hvp(x, w, v).eq(0).all()
    assert gk.splitting_weight(w[:0], w[:0]).shape == (0, n)


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    x, w, v = make((6304, 200, 2, 96), dtype)
    wide = make((3000, 200, 1, 500), dtype)
    *images, sliding = make_conv(CONVOLUTIONS[-1], dtype)
    return {
        "fused": lambda: gk.splitting_hvp(x, w, v),
        "projected": lambda: gk.splitting_hvp(*wide),
        "convolution": lambda: gk.splitting_hvp_conv2d(*images, *sliding),
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
    x, w, v = make((500, 40, 1, 48), torch.bfloat16)
    w[123, 7] = bad
    y = gk.splitting_hvp(x, w, v)
    assert not y[7].isfinite().any()
    assert y[:7].isfinite().all()
    assert y[8:].isfinite().all()


def test_gradients() -> None:
    arguments = [t.requires_grad_() for t in make((9, 3, 2, 5), torch.float64)]
    assert torch.autograd.gradcheck(gk.splitting_hvp, arguments)
    x, w, v = (t.detach().requires_grad_() for t in make((400, 30, 1, 64), torch.bfloat16))
    gk.splitting_hvp(x, w, v).float().square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, w, v))


def test_bad_input_is_refused_as_on_the_cpu() -> None:
    x, w, v = (t.cuda() for t in (torch.ones(5, 4), torch.ones(5, 3), torch.ones(3, 4)))
    with pytest.raises(ValueError, match="v holds vectors of length 3 but x has rows of length 4"):
        gk.splitting_hvp(x, w, v[:, 1:])
    with pytest.raises(ValueError, match="move them to one device"):
        gk.splitting_hvp(x, w.cpu(), v)


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
