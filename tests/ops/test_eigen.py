"""symmetric_eigs: all eigenpairs of many small symmetric matrices."""

from __future__ import annotations

import math

import pytest
import torch
from eigen_checks import check_eigenpairs, symmetric
from torch import Tensor
from torch.library import opcheck

from growkernels.ops.eigen import symmetric_eigs

DTYPES = [torch.float32, torch.float64]


def check(a: Tensor) -> None:
    found = symmetric_eigs(a)
    assert {part.dtype for part in found} == {a.dtype}
    check_eigenpairs(a, found)


# Fewer matrices than a register holds, as many, and more; one element to more than a cache line.
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 2), (8, 3), (13, 6), (100, 9), (17, 24), (3, 70)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_matrices(n: int, m: int, dtype: torch.dtype) -> None:
    check(symmetric(n, m, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_matrices(dtype: torch.dtype) -> None:
    vector = torch.randn(6, dtype=dtype)
    ones = torch.ones(5, dtype=dtype)
    wilkinson = torch.diag(torch.arange(6.0, dtype=dtype).sub(2.5).abs())
    wilkinson += torch.diag(ones, 1) + torch.diag(ones, -1)
    graded = symmetric(1, 6, dtype)[0] * torch.logspace(0, -18, 6, dtype=dtype).outer(
        torch.logspace(0, -18, 6, dtype=dtype)
    )
    check(
        torch.stack(
            [
                torch.zeros(6, 6, dtype=dtype),
                torch.eye(6, dtype=dtype),
                torch.ones(6, 6, dtype=dtype),
                vector.outer(vector),
                wilkinson,
                graded,
                1e-30 * symmetric(1, 6, dtype)[0],
                1e30 * symmetric(1, 6, dtype)[0],
                torch.diag(torch.tensor([1e30, 1.0, 1e-30, 0.0, -1e-30, -1e30], dtype=dtype)),
            ]
        )
    )


def test_reads_the_lower_triangle_through_any_strides() -> None:
    a = symmetric(5, 4, torch.float64)
    expected = symmetric_eigs(a)
    spoilt = a.tril() + torch.full((4, 4), 7.0, dtype=torch.float64).triu(1)
    padded = torch.zeros(5, 9, 11, dtype=torch.float64)[:, ::2, 1:6][:, :4, :4]
    padded.copy_(spoilt)
    for got, want in zip(symmetric_eigs(padded), expected, strict=True):
        assert got.equal(want)


def test_no_matrix_depends_on_its_neighbours() -> None:
    a = symmetric(37, 7, torch.float32)
    a[20] *= 1e20
    together = symmetric_eigs(a)
    for i in (0, 7, 8, 19, 36):
        for got, want in zip(symmetric_eigs(a[i : i + 1]), together, strict=True):
            assert got[0].equal(want[i])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_in_its_own_matrix_alone(bad: float) -> None:
    a = symmetric(9, 5, torch.float32)
    expected = symmetric_eigs(a)
    a[3, 4, 1] = bad
    values, vectors = symmetric_eigs(a)
    assert values[3].isnan().all()
    assert vectors[3].isnan().all()
    others = torch.arange(9) != 3
    assert values[others].equal(expected[0][others])
    assert vectors[others].equal(expected[1][others])


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0)])
def test_zero_sizes(shape: tuple[int, ...]) -> None:
    values, vectors = symmetric_eigs(torch.empty(shape))
    assert values.shape == shape[:2]
    assert vectors.shape == shape


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="pass square matrices"):
        symmetric_eigs(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="pass square matrices"):
        symmetric_eigs(torch.ones(3, 3))
    with pytest.raises(TypeError, match="pass float32 or float64"):
        symmetric_eigs(torch.ones(1, 3, 3, dtype=torch.bfloat16))


def test_derivatives_are_refused() -> None:
    values, _ = symmetric_eigs(symmetric(2, 3, torch.float64).requires_grad_())
    with pytest.raises(RuntimeError, match="symmetric_eigs is not implemented"):
        values.sum().backward()


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 2, 2)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    opcheck(torch.ops.growkernels.symmetric_eigs.default, (torch.ones(shape),))
