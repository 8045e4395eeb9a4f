"""virtual_grads and virtual_grad_norms on a GPU, against the oracle in float64 on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from op_samples import DTYPES
from op_samples.numbers import relative
from op_samples.virtual_grad import positions
from torch import Tensor

import growkernels as gk
from growkernels.ops.virtual_grad import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_precision")]

ERRORS = {torch.float64: 1e-13, torch.float32: 6e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
KINDS = [
    ("linear_relu", "tanh", 1.0),
    *(("residual", activation, -0.8) for activation in reference.ACTIVATIONS),
    ("conv2d_relu", "tanh", 1.0),
    ("linear", "tanh", 1.0),
]
# Lists that lead to every tile: narrow ones, up to 64, up to 128, 256 and 384 and several of them;
# with few samples and with so many that ranges of them are summed apart.
LINEAR_SHAPES = [
    [(450, 5)] * 6,
    [(450, 5), (4100, 9), (1, 1), (100_000, 16)],
    [(129, 33), (7, 17), (3, 4, 20), (20_000, 64)],
    [(3000, 128), (50, 401), (1000, 100)],
    [(5000, 256), (3000, 512)],
    [(7001, 384)] * 3,
    [(300, 1024), (65, 776)],
]
CONV_SHAPES = [[(2, 3, 5, 5), (1, 4, 1, 1), (3, 16, 8, 6)]]


def draw(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, layer: str = "residual"
) -> tuple[list[Tensor], list[Tensor]]:
    tensors = positions(shapes, layer).tensors(dtype, "cuda", seed=int(torch.randint(2**31, ())))
    return tensors[: len(shapes)], tensors[len(shapes) :]


def exact(inputs: list[Tensor], grads: list[Tensor], layer: str, **params: Any) -> list[Tensor]:
    hs, gs = [h.double() for h in inputs], [g.double() for g in grads]
    return reference.virtual_grads(hs, gs, layer, **params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer", "activation", "scale"), KINDS)
def test_against_the_oracle(layer: str, activation: str, scale: float, dtype: torch.dtype) -> None:
    for shapes in CONV_SHAPES if layer == "conv2d_relu" else LINEAR_SHAPES:
        inputs, grads = draw(shapes, dtype, layer)
        params: dict[str, Any] = {"activation": activation, "scale": scale}
        expected = exact(inputs, grads, layer, **params)
        actual = gk.virtual_grads(inputs, grads, layer, **params)
        norms = gk.virtual_grad_norms(inputs, grads, layer, **params)
        # The vendor's weight gradient leaves 16-bit convolutions rounded to 16 bits.
        error = ERRORS[dtype] * (4 if layer == "conv2d_relu" else 1)
        for gradient, norm, true in zip(actual, norms, expected, strict=True):
            assert relative(gradient, true) <= error
            assert relative(norm, gradient.double().square().sum()) <= max(error / 4, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation(dtype: torch.dtype) -> None:
    shapes = [(450, 5), (7001, 384), (129, 33)]
    sums = [
        torch.zeros(s[1], s[1], device="cuda", dtype=torch.promote_types(dtype, torch.float32))
        for s in shapes
    ]
    moments = torch.zeros(6, device="cuda", dtype=sums[0].dtype)[::2]
    expected = [torch.zeros_like(sum, dtype=torch.float64) for sum in sums]
    expected_moments = torch.zeros(3, device="cuda", dtype=torch.float64)
    for _ in range(3):
        inputs, grads = draw(shapes, dtype)
        norms = gk.virtual_grad_norms(inputs, grads, "linear_relu", sums, second_moments=moments)
        batch = exact(inputs, grads, "linear_relu")
        expected = [a + b for a, b in zip(expected, batch, strict=True)]
        expected_moments += torch.stack([b.square().sum() for b in batch])
    for actual, true in zip(sums, expected, strict=True):
        assert relative(actual, true) <= ERRORS[dtype]
    true_norms = torch.stack([sum.double().square().sum() for sum in sums])
    assert relative(norms, true_norms) <= 1e-6
    assert relative(moments, expected_moments) <= 2 * ERRORS[dtype]


def test_tensorfloat_32_follows_torch() -> None:
    inputs, grads = draw([(5000, 128), (300, 40)], torch.float32)
    expected = exact(inputs, grads, "linear_relu")
    torch.backends.cuda.matmul.allow_tf32 = True
    rounded = gk.virtual_grads(inputs, grads, "linear_relu")
    assert all(1e-5 < relative(*pair) < 1e-3 for pair in zip(rounded, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_anywhere_in_memory(dtype: torch.dtype) -> None:
    width = 200
    base = torch.randn(3000, 3 * width + 1, device="cuda").to(dtype)
    views = [base[:, :width], base[:, width + 1 : 2 * width + 1], base[::3, 3:83], base[:80].T]
    grads = [torch.randn(v.shape, device="cuda").to(dtype) for v in views]
    for gradient, true in zip(
        gk.virtual_grads(views, grads, "linear_relu"),
        exact(views, grads, "linear_relu"),
        strict=True,
    ):
        assert relative(gradient, true) <= ERRORS[dtype]


def test_offsets_beyond_32_bits() -> None:
    base = torch.empty(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    base[:, :64] = torch.randn(70_000, 64, device="cuda")
    base[:, 64:70] = torch.randn(70_000, 6, device="cuda")
    views = [base[:, :64], base[:, 64:70]]
    (wide, narrow) = gk.virtual_grads(views, views, "linear_relu")
    true = exact([v.contiguous() for v in views], [v.contiguous() for v in views], "linear_relu")
    assert relative(wide, true[0]) <= 4e-3
    assert relative(narrow, true[1]) <= 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_lists(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(0, 20), *((3 + i, 1 + i) for i in range(80))]
    inputs, grads = draw(shapes, dtype)
    norms = gk.virtual_grad_norms(inputs, grads, "linear_relu")
    assert norms[0] == 0
    true = torch.stack([g.square().sum() for g in exact(inputs, grads, "linear_relu")])
    assert relative(norms, true) <= 2 * ERRORS[dtype]


@pytest.mark.parametrize("width", [5, 40, 384])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype, width: int) -> None:
    (h,), (g,) = draw([(50, width)], dtype)
    h[3, 0], h[7, 1], g[9, 2], h[9, 2] = math.nan, math.inf, -math.inf, 1
    (actual,) = gk.virtual_grads([h], [g], "linear_relu")
    (true,) = exact([h], [g], "linear_relu")
    # ATen lets the gradient through where h is NaN, which is the dtype without a kernel here.
    if dtype != torch.float64:
        assert torch.equal(actual.isnan(), true.isnan())
    assert actual[:, 0].isnan().all()


@pytest.mark.parametrize("layer", ["linear_relu", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_without_waiting_and_from_a_graph(
    layer: str,
    dtype: torch.dtype,
    no_host_sync: Callable[[], AbstractContextManager[None]],
    replayed: Callable[[Callable[[], Any]], Any],
) -> None:
    inputs, grads = draw([(7001, 384), (450, 5), (300, 72), (5000, 12)], dtype)

    def call() -> list[Tensor]:
        norms = gk.virtual_grad_norms(inputs, grads, layer)
        return [norms, *gk.virtual_grads(inputs, grads, layer)]

    first = call()
    with no_host_sync():
        again = call()
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, replayed(call)))


def test_another_stream() -> None:
    inputs, grads = draw([(7001, 384), (450, 5)], torch.bfloat16)
    expected = gk.virtual_grad_norms(inputs, grads, "linear_relu")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = gk.virtual_grad_norms(inputs, grads, "linear_relu")
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_gradients_of_norms() -> None:
    inputs, grads = draw([(50, 20), (30, 5)], torch.float32)
    leaves = [t.requires_grad_() for t in (*inputs, *grads)]
    gk.virtual_grad_norms(inputs, grads, "residual").sum().backward()
    copies = [t.detach().double().requires_grad_() for t in leaves]
    reference.virtual_grad_norms(copies[:2], copies[2:], "residual").sum().backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        assert leaf.grad is not None
        assert copy.grad is not None
        assert relative(leaf.grad, copy.grad) <= 1e-5


def test_buffers_that_share_memory_are_refused() -> None:
    inputs, grads = draw([(50, 20)] * 2, torch.float32)
    buffer = torch.zeros(20, 20, device="cuda")
    with pytest.raises(ValueError, match="share memory"):
        gk.virtual_grads(inputs, grads, "linear_relu", out=[buffer, buffer])
