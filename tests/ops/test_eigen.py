"""symmetric_eigs: all eigenpairs of many small symmetric matrices."""

from __future__ import annotations

import pytest
import torch
from op_samples import eigen
from op_samples.eigen import BAD, DTYPES, NOT_FINITE, ZERO_SIZES, symmetric
from torch.library import opcheck

from growkernels.ops.eigen import symmetric_eigs


# Fewer matrices than a register holds, as many, and more; one element to more than a cache line.
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 2), (8, 3), (13, 6), (100, 9), (17, 24), (3, 70)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_matrices(n: int, m: int, dtype: torch.dtype) -> None:
    eigen.check_op(symmetric(n, m, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_matrices(dtype: torch.dtype) -> None:
    eigen.check_op(eigen.special(dtype))


def test_reads_the_lower_triangle_through_any_strides() -> None:
    eigen.check_strides("cpu")


def test_no_matrix_depends_on_its_neighbours() -> None:
    a = symmetric(37, 7, torch.float32)
    a[20] *= 1e20
    together = symmetric_eigs(a)
    for i in (0, 7, 8, 19, 36):
        for got, want in zip(symmetric_eigs(a[i : i + 1]), together, strict=True):
            assert got[0].equal(want[i])


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_what_is_not_finite_gives_nan_in_its_own_matrix_alone(bad: float) -> None:
    eigen.check_not_finite(bad, 9, 5, "cpu")


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("k", [None, 1])
def test_one_value_anywhere_makes_a_matrix_not_finite(bad: float, k: int | None) -> None:
    places = torch.tril_indices(5, 5).T.tolist()
    a = symmetric(len(places), 5, torch.float64)
    for matrix, (i, j) in enumerate(places):
        a[matrix, i, j] = bad
    for found in symmetric_eigs(a, k):
        assert bool(found.isnan().all())


@pytest.mark.parametrize("shape", ZERO_SIZES)
def test_zero_sizes(shape: tuple[int, ...]) -> None:
    eigen.check_zero_size(shape, "cpu")


@pytest.mark.parametrize(("shape", "dtype", "error", "sentence"), BAD)
def test_bad_input(
    shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], sentence: str
) -> None:
    eigen.check_bad(shape, dtype, error, sentence, "cpu")


def test_derivatives_are_refused() -> None:
    values, _ = symmetric_eigs(symmetric(2, 3, torch.float64).requires_grad_())
    with pytest.raises(RuntimeError, match="symmetric_eigs is not implemented"):
        values.sum().backward()


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 2, 2)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    opcheck(torch.ops.growkernels.symmetric_eigs.default, (torch.ones(shape),))
