"""The CUDA kernels of virtual_grad, executed on the host by the launch shim, against the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from host_compiler import HERE, HostCompiler, HostLibrary
from torch import Tensor

from growkernels.ops.virtual_grad import reference

LAYERS = ("linear_relu", "residual")
ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "sigmoid")
STORES = ("nothing", "write", "accumulate")
# Lists of tiles: the dtype of the tensors, the sums' relative error, how many tiles there are.
BFLOAT16, FLOAT16, FLOAT32, TF32 = range(4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float32)
ERRORS = (4e-3, 5e-4, 1e-6, 5e-4)
TILES = [(BFLOAT16, 0), (BFLOAT16, 1), (BFLOAT16, 2), (BFLOAT16, 3), (FLOAT16, 2), (FLOAT16, 3)]
TILES += [(FLOAT32, 0), (FLOAT32, 1), (TF32, 0), (TF32, 1)]


class Result(NamedTuple):
    gradients: list[Tensor]
    norms: Tensor
    second_moments: Tensor
    launches: int


@pytest.fixture(scope="module")
def kernels(host_compiler: HostCompiler) -> HostLibrary:
    return host_compiler(HERE / "virtual_grad.cpp")


@contextmanager
def copies_arrive_at_once(kernels: HostLibrary) -> Iterator[None]:
    """Asynchronous copies otherwise arrive when they are waited for, and not before."""
    kernels.call("let_copies_arrive", 0)
    try:
        yield
    finally:
        kernels.call("let_copies_arrive", 1)


def run(
    kernels: HostLibrary,
    inputs: list[Tensor],
    grads: list[Tensor],
    dtype: int,
    layer: str = "linear_relu",
    *,
    tile: int = -1,
    activation: str = "tanh",
    scale: float = 1.0,
    store: str = "write",
    buffers: list[Tensor] | None = None,
    multiprocessors: int = 1,
) -> Result:
    """One call; without `buffers`, G starts as NaN and so do norms and second moments (as 1)."""
    if buffers is None:
        buffers = [torch.full((h.shape[1], h.shape[1]), math.nan) for h in inputs]
    rows = [
        [h.data_ptr(), g.data_ptr(), b.data_ptr(), h.stride(0), g.stride(0), *h.shape]
        for h, g, b in zip(inputs, grads, buffers, strict=True)
    ]
    norms, moments = torch.full((len(rows),), math.nan), torch.ones(2 * len(rows))
    kernels.call(
        "virtual_grad", torch.tensor(rows), len(rows), dtype, tile, LAYERS.index(layer),
        ACTIVATIONS.index(activation), float(scale), STORES.index(store),
        norms, moments if store == "accumulate" else None, 2, multiprocessors,
    )  # fmt: skip
    launches = torch.zeros(1, dtype=torch.int64)
    kernels.call("launches_of_last_call", launches)
    return Result(buffers, norms, moments[::2], int(launches))


def draw(
    shapes: list[tuple[int, int]], dtype: int, padding: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Normal numbers; rows are `padding` elements further apart than they are long."""

    def one(samples: int, width: int) -> Tensor:
        return torch.randn(samples, width + padding).to(DTYPES[dtype])[:, :width]

    return [one(*shape) for shape in shapes], [one(*shape) for shape in shapes]


def exact(
    inputs: list[Tensor], grads: list[Tensor], layer: str, activation: str, scale: float
) -> list[Tensor]:
    hs, gs = [h.double() for h in inputs], [g.double() for g in grads]
    return reference.virtual_grads(hs, gs, layer, activation=activation, scale=scale)


def close(actual: Tensor, expected: Tensor, error: float) -> bool:
    if expected.numel() == 0:
        return actual.shape == expected.shape
    difference = (actual.double() - expected).norm().item()
    return difference <= error * expected.norm().item() + 1e-30


def check(result: Result, expected: list[Tensor], error: float) -> None:
    for gradient, true in zip(result.gradients, expected, strict=True):
        assert close(gradient, true, error)
    norms = torch.stack([g.double().square().sum() for g in result.gradients])
    torch.testing.assert_close(result.norms.double(), norms, rtol=1e-6, atol=0)


# Samples beyond a ring of stages, widths beyond a tile and not multiples of a vector; rows of
# 16-byte vectors and rows at any address.
@pytest.mark.parametrize("padding", [0, 7], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_every_tile(kernels: HostLibrary, dtype: int, tile: int, padding: int) -> None:
    widest = 392 if (dtype, tile) == (BFLOAT16, 0) else 264 if tile == 1 and dtype == 0 else 136
    inputs, grads = draw([(70, widest + padding % 2), (33, 40)], dtype, padding)
    result = run(kernels, inputs, grads, dtype, tile=tile)
    check(result, exact(inputs, grads, "linear_relu", "tanh", 1), ERRORS[dtype])
    assert result.launches == 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", range(4), ids=["bfloat16", "float16", "float32", "tf32"])
def test_residual(kernels: HostLibrary, dtype: int, activation: str) -> None:
    inputs, grads = draw([(37, 24), (50, 5), (20, 16)], dtype)
    result = run(kernels, inputs, grads, dtype, "residual", activation=activation, scale=-0.8)
    check(result, exact(inputs, grads, "residual", activation, -0.8), ERRORS[dtype])


# Enough multiprocessors that the samples are cut into ranges: of a tile, of several, of a narrow G.
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_ranges_of_samples(kernels: HostLibrary, dtype: int) -> None:
    inputs, grads = draw([(1100, 72), (300, 20), (0, 30), (4500, 9)], dtype)
    result = run(kernels, inputs, grads, dtype, multiprocessors=64)
    check(result, exact(inputs, grads, "linear_relu", "tanh", 1), ERRORS[dtype])
    assert result.launches == 5
    again = run(kernels, inputs, grads, dtype, multiprocessors=64)
    assert torch.equal(result.norms, again.norms)


@pytest.mark.parametrize(("count", "width"), [(1, 384), (12, 384), (1, 1024), (1, 768)])
@pytest.mark.parametrize("multiprocessors", [108, 132])
def test_many_samples_fill_every_wave_of_blocks(
    kernels: HostLibrary, multiprocessors: int, count: int, width: int
) -> None:
    blocks = torch.zeros(1, dtype=torch.int64)
    kernels.call("planned_blocks", count, 50_432, width, multiprocessors, blocks)
    waves = math.ceil(int(blocks) / multiprocessors)
    assert int(blocks) >= 0.9 * waves * multiprocessors


@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_accumulate(kernels: HostLibrary, multiprocessors: int) -> None:
    inputs, grads = draw([(600, 40), (40, 70), (9, 3)], FLOAT32)
    start = [torch.randn(h.shape[1], h.shape[1]) for h in inputs]
    result = run(
        kernels, inputs, grads, FLOAT32, store="accumulate", buffers=[b.clone() for b in start],
        multiprocessors=multiprocessors,
    )  # fmt: skip
    batch = exact(inputs, grads, "linear_relu", "tanh", 1)
    check(result, [a + b for a, b in zip(start, batch, strict=True)], 1e-6)
    moments = torch.stack([1 + g.square().sum() for g in batch])
    torch.testing.assert_close(result.second_moments.double(), moments, rtol=1e-5, atol=0)


def test_norms_alone_leave_gradients_untouched(kernels: HostLibrary) -> None:
    inputs, grads = draw([(40, 70), (10, 4)], FLOAT32)
    result = run(kernels, inputs, grads, FLOAT32, store="nothing")
    written = run(kernels, inputs, grads, FLOAT32)
    assert all(g.isnan().all() for g in result.gradients)
    assert torch.equal(result.norms, written.norms)


def test_many_narrow_positions_are_one_launch(kernels: HostLibrary) -> None:
    inputs, grads = draw([(450, 5)] * 6, BFLOAT16)
    result = run(kernels, inputs, grads, BFLOAT16, multiprocessors=132)
    check(result, exact(inputs, grads, "linear_relu", "tanh", 1), ERRORS[BFLOAT16])
    assert result.launches == 1


def test_more_positions_than_a_table_holds(kernels: HostLibrary) -> None:
    inputs, grads = draw([(3 + i, 1 + i % 7) for i in range(40)], FLOAT32)
    result = run(kernels, inputs, grads, FLOAT32)
    check(result, exact(inputs, grads, "linear_relu", "tanh", 1), 1e-6)
    assert result.launches == 2


def test_no_samples_and_no_width(kernels: HostLibrary) -> None:
    inputs, grads = draw([(0, 20), (5, 0), (0, 3)], FLOAT32)
    result = run(kernels, inputs, grads, FLOAT32, multiprocessors=64)
    assert torch.equal(result.norms, torch.zeros(3))
    assert all(g.eq(0).all() for g in result.gradients)


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32, TF32])
def test_nan_and_infinity(kernels: HostLibrary, dtype: int, width: int) -> None:
    inputs, grads = draw([(20, width)], dtype)
    inputs[0][3, 0], inputs[0][7, 1], grads[0][9, 2] = math.nan, math.inf, -math.inf
    inputs[0][9, 2] = 1
    actual = run(kernels, inputs, grads, dtype).gradients[0].double()
    expected = exact(inputs, grads, "linear_relu", "tanh", 1)[0]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isposinf(), expected.isposinf())
    finite = expected.isfinite()
    assert close(actual[finite], expected[finite], ERRORS[dtype])


# What a missing barrier, or a copy that is not waited for, would change: the order of threads, and
# when copies arrive.
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_same_bits_in_any_order(kernels: HostLibrary, dtype: int, layer: str) -> None:
    inputs, grads = draw([(250, 136), (100, 12)], dtype)

    def results() -> list[Tensor]:
        result = run(kernels, inputs, grads, dtype, layer, multiprocessors=8)
        return [*result.gradients, result.norms]

    first = results()
    with kernels.backwards():
        backwards = results()
    with copies_arrive_at_once(kernels):
        early = results()
    assert all(map(torch.equal, first, backwards))
    assert all(map(torch.equal, first, early))


def test_conversions_of_16_bit_numbers(kernels: HostLibrary) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    widened = torch.empty(2, 1 << 16)
    kernels.call("widen_all", widened[0], widened[1])
    for mine, dtype in zip(widened, (torch.bfloat16, torch.float16), strict=True):
        torch.testing.assert_close(mine, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    # Every exponent; ties and what is next to them; subnormal numbers.
    x = torch.randint(-(1 << 31), 1 << 31, (200_000,)).to(torch.int32)
    x[::2] &= -0x1000
    floats = x.view(torch.float32)
    floats[::7] = torch.randn(len(floats[::7])) * 1e-6
    floats = torch.cat([floats, widened.flatten(), torch.tensor([65519.996, 65520.0, 2**-25])])
    narrowed = torch.empty(2, len(floats), dtype=torch.int16)
    kernels.call("narrow_all", floats, narrowed[0], narrowed[1], len(floats))
    for mine, dtype in zip(narrowed, (torch.bfloat16, torch.float16), strict=True):
        expected = floats.to(dtype)
        torch.testing.assert_close(mine.view(dtype), expected, rtol=0, atol=0, equal_nan=True)
