"""The CUDA kernel of symmetric_eigs, executed on the host by the launch shim."""

from __future__ import annotations

import math

import pytest
import torch
from host_compiler import HERE, HostCompiler, HostLibrary
from op_samples.eigen import check_eigenpairs, symmetric
from torch import Tensor

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def kernels(host_compiler: HostCompiler) -> HostLibrary:
    return host_compiler(HERE / "symmetric_eigs.cpp")


def eigs(
    kernels: HostLibrary,
    a: Tensor,
    threads: int = 0,
    blocks: int | None = None,
    shared: bool = True,
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of a [n, m, m] by the kernel; `threads` 0 means as many as the launcher takes."""
    n, m, _ = a.shape
    a = a.contiguous()
    values, vectors = a.new_full((n, m), math.nan), torch.full_like(a, math.nan)
    name = {torch.float32: "eigs_float32", torch.float64: "eigs_float64"}[a.dtype]
    kernels.call(name, a, values, vectors, n, m, threads, n if blocks is None else blocks, shared)
    return values, vectors


# One warp and several, odd sizes and even, fewer pairs than lanes and more.
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (5, 2), (4, 3), (20, 5), (20, 6), (3, 16), (2, 17), (1, 36), (1, 70)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_matrices(kernels: HostLibrary, n: int, m: int, dtype: torch.dtype) -> None:
    a = symmetric(n, m, dtype)
    check_eigenpairs(a, eigs(kernels, a))


# An RTX card, an A100, an H100.
@pytest.mark.parametrize("most_shared", [99 << 10, 163 << 10, 227 << 10])
def test_no_launch_asks_for_more_shared_memory_than_the_gpu_has(
    kernels: HostLibrary, most_shared: int
) -> None:
    in_shared, size = torch.zeros(2, dtype=torch.int64)
    fits = []
    for m in range(1, 257):
        kernels.call("eigen_launch", m, most_shared, in_shared, size)
        assert bool(in_shared) == (int(size) <= most_shared)
        fits.append(bool(in_shared))
    assert all(fits[:78])
    assert not all(fits)


def special(dtype: torch.dtype) -> Tensor:
    vector = torch.randn(6, dtype=dtype)
    ones = torch.ones(5, dtype=dtype)
    wilkinson = torch.diag(torch.arange(6.0, dtype=dtype).sub(2.5).abs())
    wilkinson += torch.diag(ones, 1) + torch.diag(ones, -1)
    steps = torch.logspace(0, -18, 6, dtype=dtype)
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    # Two pairs of equal eigenvalues, in a basis that hides them.
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    repeated = basis @ torch.tensor([1.0, 1, 2, 2, 2, -3], dtype=torch.float64).diag() @ basis.mT
    return torch.stack(
        [
            torch.zeros(6, 6, dtype=dtype),
            torch.eye(6, dtype=dtype),
            torch.diag(torch.tensor([3.0, -1, 2, 0, -1, 5], dtype=dtype)),
            torch.ones(6, 6, dtype=dtype),
            vector.outer(vector),
            wilkinson,
            (0.5 * (repeated + repeated.mT)).to(dtype),
            symmetric(1, 6, dtype)[0] * steps.outer(steps),
            1e-30 * symmetric(1, 6, dtype)[0],
            1e30 * symmetric(1, 6, dtype)[0],
            tiny / 64 * symmetric(1, 6, dtype)[0],
            huge / 64 * symmetric(1, 6, dtype)[0].clamp(-8, 8),
            torch.diag(torch.tensor([1e30, 1.0, 1e-30, 0.0, -1e-30, -1e30], dtype=dtype)),
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_matrices(kernels: HostLibrary, dtype: torch.dtype) -> None:
    a = special(dtype)
    check_eigenpairs(a, eigs(kernels, a))


@pytest.mark.parametrize(("threads", "shared"), [(32, True), (32, False), (64, True), (96, False)])
def test_neither_threads_nor_memory_nor_blocks_change_a_bit(
    kernels: HostLibrary, threads: int, shared: bool
) -> None:
    a = torch.cat([special(torch.float64), symmetric(3, 6, torch.float64)])
    expected = eigs(kernels, a)
    for blocks in (len(a), 3):
        for got, want in zip(eigs(kernels, a, threads, blocks, shared), expected, strict=True):
            assert got.equal(want)
    with kernels.backwards():
        for got, want in zip(eigs(kernels, a, threads, 3, shared), expected, strict=True):
            assert got.equal(want)


def test_reads_the_lower_triangle(kernels: HostLibrary) -> None:
    a = symmetric(5, 4, torch.float64)
    spoilt = a.tril() + torch.full((4, 4), 7.0, dtype=torch.float64).triu(1)
    for got, want in zip(eigs(kernels, spoilt), eigs(kernels, a), strict=True):
        assert got.equal(want)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("blocks", [9, 2])
def test_what_is_not_finite_gives_nan_in_its_own_matrix_alone(
    kernels: HostLibrary, bad: float, blocks: int
) -> None:
    a = symmetric(9, 5, torch.float32)
    expected = eigs(kernels, a)
    a[3, 4, 1] = bad
    values, vectors = eigs(kernels, a, blocks=blocks)
    assert values[3].isnan().all()
    assert vectors[3].isnan().all()
    others = torch.arange(9) != 3
    assert values[others].equal(expected[0][others])
    assert vectors[others].equal(expected[1][others])
