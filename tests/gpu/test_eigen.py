"""symmetric_eigs on a GPU, against LAPACK in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from eigen_checks import check_eigenpairs, symmetric

from growkernels.ops.eigen import symmetric_eigs

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64]


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
    a = symmetric(n, m, dtype, "cuda")
    found = symmetric_eigs(a)
    assert all(part.dtype == dtype and part.device == a.device for part in found)
    check_eigenpairs(a, found)
    for again, first in zip(symmetric_eigs(a), found, strict=True):
        assert again.equal(first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_matrices(dtype: torch.dtype) -> None:
    steps = torch.logspace(0, -18, 6, dtype=dtype, device="cuda")
    graded = symmetric(1, 6, dtype, "cuda")[0] * steps.outer(steps)
    vector = torch.randn(6, dtype=dtype, device="cuda")
    a = torch.stack(
        [
            torch.zeros_like(graded),
            torch.eye(6, dtype=dtype, device="cuda"),
            torch.ones_like(graded),
            vector.outer(vector),
            graded,
            1e-30 * symmetric(1, 6, dtype, "cuda")[0],
            1e30 * symmetric(1, 6, dtype, "cuda")[0],
            torch.diag(steps * torch.tensor([1, -1, 1, 0, -1, 1], device="cuda")),
        ]
    )
    check_eigenpairs(a, symmetric_eigs(a))


def test_reads_the_lower_triangle_through_any_strides() -> None:
    a = symmetric(5, 4, torch.float64, "cuda")
    expected = symmetric_eigs(a)
    spoilt = a.tril() + torch.full_like(a, 7.0).triu(1)
    padded = torch.zeros(5, 9, 11, dtype=torch.float64, device="cuda")[:, ::2, 1:6][:, :4, :4]
    padded.copy_(spoilt)
    for got, want in zip(symmetric_eigs(padded), expected, strict=True):
        assert got.equal(want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("m", [5, 40, 119])
def test_what_is_not_finite_gives_nan_in_its_own_matrix_alone(bad: float, m: int) -> None:
    a = symmetric(900, m, torch.float32, "cuda")
    expected = symmetric_eigs(a)
    a[3, 4, 1] = bad
    values, vectors = symmetric_eigs(a)
    assert values[3].isnan().all()
    assert vectors[3].isnan().all()
    others = torch.arange(900, device="cuda") != 3
    assert values[others].equal(expected[0][others])
    assert vectors[others].equal(expected[1][others])


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0)])
def test_zero_sizes(shape: tuple[int, ...]) -> None:
    values, vectors = symmetric_eigs(torch.empty(shape, device="cuda"))
    assert values.shape == shape[:2]
    assert vectors.shape == shape


def test_more_than_two_to_the_31_elements() -> None:
    n, m = (1 << 31) // 36 + 5, 6
    if torch.cuda.mem_get_info()[0] < 3 * n * m * m * 4:
        pytest.skip("needs 26 GB of free GPU memory")
    last = symmetric(3, m, torch.float32, "cuda")
    a = torch.zeros(n, m, m, device="cuda")
    a[-3:] = last
    values, vectors = symmetric_eigs(a)
    check_eigenpairs(last, (values[-3:], vectors[-3:]))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="pass square matrices"):
        symmetric_eigs(torch.ones(2, 3, 4, device="cuda"))
    with pytest.raises(TypeError, match="pass float32 or float64"):
        symmetric_eigs(torch.ones(1, 3, 3, dtype=torch.bfloat16, device="cuda"))


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
