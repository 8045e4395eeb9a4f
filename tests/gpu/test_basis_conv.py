"""basis_conv2d on a GPU, against the oracle in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from op_samples.basis_conv import BEYOND_32_BITS, CHOSEN, FORMATS, Shape
from torch import Tensor

import growkernels as gk
from growkernels.ops.basis_conv import gpu, reference
from growkernels.ops.basis_conv.plan import Tiles
from growkernels.ops.basis_conv.triton_tiles import (
    BACKWARD_TILES,
    FORWARD_TILES,
    ROW_TILES,
    forward_tile,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# TF32 rounds factors to 2^-11; 16-bit types round maps, coefficients and results.
ERROR = {torch.float64: 1e-13, torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LOW = [torch.bfloat16, torch.float16, torch.float32]

ODD = [
    Shape((2, 5, 7, 6), 6, 7),
    Shape((1, 1, 1, 1), 1, 1, (1, 1), padding=(0, 0)),
    Shape((2, 70, 5, 3), 20, 47, padding=(2, 2)),
    Shape((2, 6, 9, 8), 4, 9, padding=(2, 3), dilation=(2, 3)),
    Shape((1, 3, 12, 10), 33, 34, (2, 3), (2, 1), (1, 0), (1, 2)),
    Shape((2, 130, 8, 8), 200, 260),
    Shape((2, 8, 8, 8), 257, 300),
]


def make(
    shape: Shape, dtype: torch.dtype, include_basis: bool = True, name: str = "channels_last"
) -> list[Tensor]:
    """x, basis, coeff, bias."""
    x, *parameters = shape.sample(include_basis, unit=True).tensors(dtype, DEVICE)
    return [x.contiguous(memory_format=FORMATS[name]), *parameters]


def call(tensors: list[Tensor], shape: Shape, include_basis: bool = True) -> Tensor:
    return gk.basis_conv2d(*tensors, *shape.form, include_basis)


def with_gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, *rest: Any
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(leaves, *rest)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def oracle(tensors: list[Tensor], shape: Shape, include_basis: bool = True) -> Tensor:
    return reference.basis_conv2d(*tensors, *shape.form, include_basis)


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double().cpu() for t in tensors]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).norm() / expected.norm()
    few = 5 if actual.numel() < 10 else 1  # values, of which one may be a small difference
    assert error <= few * ERROR[actual.dtype], f"relative error {error:.1e}"


def unwritten(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=memory_format).fill_(
        math.nan
    )


def algorithm(tensors: list[Tensor], shape: Shape, include_basis: bool = True) -> str:
    form = [list(pair) for pair in shape.form]
    name: str = torch.ops.growkernels.basis_conv2d_algorithm(*tensors[:3], *form, include_basis)
    return name


@pytest.mark.parametrize("include_basis", [True, False])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*CHOSEN, *ODD], ids=str)
def test_all_gradients(shape: Shape, dtype: torch.dtype, include_basis: bool) -> None:
    tensors = make(shape, dtype, include_basis)
    grad = torch.randn(oracle(exact(tensors), shape, include_basis).shape).to(DEVICE, dtype)
    found = with_gradients(call, tensors, grad, shape, include_basis)
    expected = with_gradients(oracle, exact(tensors), grad.double().cpu(), shape, include_basis)
    for ours, true in zip(found, expected, strict=True):
        assert_close(ours, true)


@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_triton_is_chosen_where_the_tests_mean_it(shape: Shape) -> None:
    assert algorithm(make(shape, torch.bfloat16), shape) == "triton"
    assert algorithm(make(CHOSEN[0], torch.float64), CHOSEN[0]) == "two convolutions"


# bfloat16 and float16 share their tiles, so one of them takes full ones and the other ragged ones:
# every new case is some seconds of compilation.
TILED = [(torch.bfloat16, 0), (torch.float16, 3), (torch.float32, 0), (torch.float32, 3)]


@pytest.mark.parametrize(("dtype", "less"), TILED, ids=str)
def test_every_forward_tile(dtype: torch.dtype, less: int) -> None:
    from growkernels.ops.basis_conv import triton_launch as launch

    for tile in FORWARD_TILES[dtype.itemsize] + ROW_TILES.get(dtype.itemsize, ()):
        filters, channels = tile.filters - less, 2 * tile.depth(dtype) - less
        shape = Shape((3, channels, 9, 16), filters, 2 * tile.combinations - less)
        tensors = make(shape, dtype)
        expected = oracle(exact(tensors), shape)
        y, z = (unwritten((3, n, 9, 16), dtype) for n in (expected.shape[1], filters))
        launch.convolve(*tensors, *shape.form, y, z, tile)
        assert_close(y, expected)
        y = unwritten(y.shape, dtype)
        launch.mix(z, *tensors[2:], y, tile)
        assert_close(y, expected)


@pytest.mark.parametrize(("dtype", "less"), TILED, ids=str)
def test_every_backward_tile(dtype: torch.dtype, less: int) -> None:
    from growkernels.ops.basis_conv import triton_launch as launch

    for tile in BACKWARD_TILES[dtype.itemsize]:
        filters, mixed = tile.filters - less, tile.combinations - less
        grad, z = (
            torch.randn(5, n, 17, 16).to(DEVICE, dtype, memory_format=torch.channels_last)
            for n in (filters + mixed, filters)
        )
        coeff = torch.randn(mixed, filters).to(DEVICE, dtype)
        dz, dcoeff = unwritten(z.shape, dtype), unwritten(coeff.shape, dtype)
        dbias = unwritten((filters + mixed,), dtype)
        launch.coefficient_backward(grad, z, None, coeff, dz, dcoeff, dbias, 4, tile)
        g, maps, factors = exact([grad, z, coeff])
        mixed_grad = torch.einsum("or,nohw->nrhw", factors, g[:, filters:])
        assert_close(dz, g[:, :filters] + mixed_grad)
        assert_close(dcoeff, torch.einsum("nohw,nrhw->or", g[:, filters:], maps))
        assert_close(dbias, g.sum((0, 2, 3)))


@pytest.mark.parametrize("name", [*FORMATS, "slice"])
@pytest.mark.parametrize("shape", [CHOSEN[0], ODD[0]], ids=str)
def test_layouts(shape: Shape, name: str) -> None:
    tensors = make(
        shape, torch.bfloat16, name="contiguous" if name == "contiguous" else "channels_last"
    )
    if name == "slice":
        tensors[0] = torch.cat([tensors[0]] * 2, 1)[:, shape.x[1] :]
    y = call(tensors, shape)
    assert_close(y, oracle(exact(tensors), shape))
    fake = call([t.to("meta") for t in tensors], shape)
    assert y.stride() == fake.stride()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("include_basis", [True, False])
def test_same_bits_twice(
    dtype: torch.dtype, include_basis: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    tensors = make(CHOSEN[0], dtype, include_basis)
    grad = torch.randn_like(call(tensors, CHOSEN[0], include_basis))
    first, second = (
        with_gradients(call, tensors, grad, CHOSEN[0], include_basis) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [CHOSEN[0], ODD[0], ODD[5]], ids=str)
def test_nothing_waits_for_the_gpu(
    shape: Shape, no_host_sync: Callable[[], AbstractContextManager[None]]
) -> None:
    tensors = make(shape, torch.bfloat16)
    grad = torch.randn_like(call(tensors, shape))
    with_gradients(call, tensors, grad, shape)  # compiled and loaded
    with no_host_sync():
        with_gradients(call, tensors, grad, shape)


@pytest.mark.parametrize("shape", [CHOSEN[0], ODD[0], ODD[5]], ids=str)
def test_cuda_graph(shape: Shape, replayed: Callable[[Callable[[], Any]], Any]) -> None:
    tensors = make(shape, torch.bfloat16)
    grad = torch.randn_like(call(tensors, shape))
    found = replayed(lambda: with_gradients(call, tensors, grad, shape))
    for ours, eager in zip(found, with_gradients(call, tensors, grad, shape), strict=True):
        assert_close(ours, eager.double().cpu())


@pytest.mark.parametrize("include_basis", [True, False])
def test_compiled(include_basis: bool) -> None:
    shape = CHOSEN[0]
    tensors = make(shape, torch.bfloat16, include_basis)
    grad = torch.randn_like(call(tensors, shape, include_basis))

    @torch.compile(fullgraph=True)
    def block(leaves: list[Tensor], shape: Shape, include_basis: bool) -> Tensor:
        return torch.relu(call(leaves, shape, include_basis))

    def eager(leaves: list[Tensor], shape: Shape, include_basis: bool) -> Tensor:
        return torch.relu(oracle(leaves, shape, include_basis))

    found = with_gradients(block, tensors, grad, shape, include_basis)
    # The signs in front of the ReLU are those of the rounded values.
    rounded = with_gradients(
        lambda leaves: torch.relu(call(leaves, shape, include_basis)), tensors, grad
    )
    assert_close(found[0], eager(exact(tensors), shape, include_basis))
    for ours, same in zip(found, rounded, strict=True):
        assert_close(ours, same.double().cpu())


def test_autocast() -> None:
    shape = CHOSEN[0]
    tensors = make(shape, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y = call(tensors, shape)
    assert y.dtype == torch.bfloat16
    assert_close(y, oracle(exact(tensors), shape))


def test_float32_without_tf32_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors = make(CHOSEN[0], torch.float32)
    assert algorithm(tensors, CHOSEN[0]) == "two convolutions"
    expected = oracle(exact(tensors), CHOSEN[0])
    y = call(tensors, CHOSEN[0])
    # The vendor's Winograd loses a digit; TF32 would lose three.
    assert (y.double().cpu() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("algorithm", ["triton", "direct"])
def test_nan_and_infinity(algorithm: str) -> None:
    shape = Shape((2, 16, 12, 12), 16, 20)
    for value in (math.nan, math.inf):
        x, basis, coeff, _ = make(shape, torch.bfloat16)
        x[0, :, 0, 0] = value
        y = unwritten((2, 36, 12, 12), torch.bfloat16)
        chosen = Tiles(forward_tile(shape.filters, 288, torch.bfloat16, 1), None, 1)
        positive = x, basis.abs(), coeff.abs()
        gpu.forward(algorithm == "triton", chosen, *positive, None, shape.form, y, None)
        spread = ~y.isfinite().cpu()
        expected = torch.zeros_like(spread)
        expected[0, :, :2, :2] = True
        assert torch.equal(spread, expected)
        assert bool(y.isnan().any()) == math.isnan(value)


def test_more_than_2_to_the_31_elements() -> None:
    """y of 2.2e9 elements: the rows of the last images lie beyond what 32 bits address."""
    shape = BEYOND_32_BITS
    images, *image = shape.x
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(1, *image, device=DEVICE, dtype=torch.bfloat16)
    x = x.expand(images, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    _, *parameters = make(shape._replace(x=(1, image[0], 4, 4)), torch.bfloat16)
    y = call([x, *parameters], shape)
    assert y.numel() > 2**31
    assert algorithm([x, *parameters], shape) == "triton"
    assert torch.equal(y[0], y[-1])
    assert_close(y[:1], oracle(exact([x[:1], *parameters]), shape))
