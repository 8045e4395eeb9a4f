"""symmetric_eigs on a GPU, against LAPACK in float64 on the host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from op_samples import eigen
from op_samples.eigen import BAD, DTYPES, NOT_FINITE, ZERO_SIZES, check_eigenpairs, symmetric

from growkernels.ops.eigen import symmetric_eigs

pytestmark = pytest.mark.gpu


# One warp, several, the workspace beyond any GPU's shared memory, and what is left to torch.
@pytest.mark.parametrize(
    ("n", "m"),
    [
        (1, 1),
        (5, 2),
        (1536, 5),
        (1536, 6),
        (300, 16),
        (50, 17),
        (40, 33),
        (5, 78),
        (5, 98),
        (700, 119),
        (1, 257),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_matrices(n: int, m: int, dtype: torch.dtype) -> None:
    eigen.check_op(symmetric(n, m, dtype, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_matrices(dtype: torch.dtype) -> None:
    eigen.check_op(eigen.special(dtype, "cuda"))


def test_reads_the_lower_triangle_through_any_strides() -> None:
    eigen.check_strides("cuda")


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("m", [5, 40, 119])
def test_what_is_not_finite_gives_nan_in_its_own_matrix_alone(bad: float, m: int) -> None:
    eigen.check_not_finite(bad, 900, m, "cuda")


@pytest.mark.parametrize("shape", ZERO_SIZES)
def test_zero_sizes(shape: tuple[int, ...]) -> None:
    eigen.check_zero_size(shape, "cuda")


def test_more_than_two_to_the_31_elements() -> None:
    n, m = (1 << 31) // 36 + 5, 6
    if torch.cuda.mem_get_info()[0] < 3 * n * m * m * 4:
        pytest.skip("needs 26 GB of free GPU memory")
    last = symmetric(3, m, torch.float32, "cuda")
    a = torch.zeros(n, m, m, device="cuda")
    a[-3:] = last
    values, vectors = symmetric_eigs(a)
    check_eigenpairs(last, (values[-3:], vectors[-3:]))


@pytest.mark.parametrize(("shape", "dtype", "error", "sentence"), BAD)
def test_bad_input(
    shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], sentence: str
) -> None:
    eigen.check_bad(shape, dtype, error, sentence, "cuda")


@pytest.mark.parametrize("m", [6, 40, 119])
def test_nothing_waits_and_a_graph_replays_it(
    m: int,
    no_host_sync: Callable[[], AbstractContextManager[None]],
    replayed: Callable[[Callable[[], Any]], Any],
) -> None:
    a = symmetric(20, m, torch.float64, "cuda")
    with no_host_sync():
        expected = symmetric_eigs(a)
    for got, want in zip(replayed(lambda: symmetric_eigs(a)), expected, strict=True):
        assert got.equal(want)


def test_runs_on_the_current_stream() -> None:
    a = torch.zeros(2000, 6, 6, dtype=torch.float64, device="cuda")
    filled = symmetric(2000, 6, torch.float64, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        a.copy_(filled)
        values, _ = symmetric_eigs(a)
    torch.cuda.synchronize()
    assert values.equal(symmetric_eigs(filled)[0])
