"""Samples and checks of `symmetric_eigs`, which has no gradient, for every device and kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from growkernels.ops.eigen import symmetric_eigs

DTYPES = [torch.float32, torch.float64]
NOT_FINITE = [math.nan, math.inf]
ZERO_SIZES = [(0, 4, 4), (3, 0, 0)]
BAD = [
    ((2, 3, 4), torch.float32, ValueError, "pass square matrices"),
    ((3, 3), torch.float32, ValueError, "pass square matrices"),
    ((1, 3, 3), torch.bfloat16, TypeError, "pass float32 or float64"),
]
"""Shape, dtype, and the error and sentence for them."""


def symmetric(n: int, m: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random symmetric matrices [n, m, m]; the same on every device."""
    a = torch.randn(n, m, m, dtype=torch.float64)
    return (a + a.mT).to(device, dtype)


def special(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """[9, 6, 6]: multiple and vanishing eigenvalues, close pairs, and the ends of the range."""
    vector = torch.randn(6, dtype=dtype)
    ones = torch.ones(5, dtype=dtype)
    wilkinson = torch.diag(torch.arange(6.0, dtype=dtype).sub(2.5).abs())
    wilkinson += torch.diag(ones, 1) + torch.diag(ones, -1)
    steps = torch.logspace(0, -18, 6, dtype=dtype)
    matrices = [
        torch.zeros(6, 6, dtype=dtype),
        torch.eye(6, dtype=dtype),
        torch.ones(6, 6, dtype=dtype),
        vector.outer(vector),
        wilkinson,
        symmetric(1, 6, dtype)[0] * steps.outer(steps),
        1e-30 * symmetric(1, 6, dtype)[0],
        1e30 * symmetric(1, 6, dtype)[0],
        torch.diag(torch.tensor([1e30, 1.0, 1e-30, 0.0, -1e-30, -1e30], dtype=dtype)),
    ]
    return torch.stack(matrices).to(device)


def check_eigenpairs(a: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """Against LAPACK in float64, up to the rounding of the results' dtype."""
    values, rows = (part.double().cpu() for part in found)
    exact = a.double().cpu()
    m = a.shape[1]
    scale = exact.abs().amax((1, 2), keepdim=True).clamp_min(1e-300) * m
    error = 8 * torch.finfo(a.dtype).eps
    assert (values.diff(dim=1) >= 0).all()
    expected = torch.linalg.eigvalsh(exact)
    assert ((values - expected).abs() <= error * scale[..., 0]).all()
    assert ((rows @ exact - values[..., None] * rows).abs() <= error * scale).all()
    assert (rows @ rows.mT - torch.eye(m, dtype=torch.float64)).abs().max() <= error * m


def check_op(a: Tensor) -> None:
    """The eigenpairs of `a`, their dtype and device, and the same bits a second time."""
    found = symmetric_eigs(a)
    assert {(part.dtype, part.device) for part in found} == {(a.dtype, a.device)}
    check_eigenpairs(a, found)
    assert all(map(torch.equal, symmetric_eigs(a), found))


def check_strides(device: str) -> None:
    """The lower triangles are read, whatever lies above them and between the rows."""
    a = symmetric(5, 4, torch.float64, device)
    expected = symmetric_eigs(a)
    spoilt = a.tril() + torch.full_like(a, 7.0).triu(1)
    padded = torch.zeros(5, 9, 11, dtype=torch.float64, device=device)[:, ::2, 1:6][:, :4, :4]
    padded.copy_(spoilt)
    assert all(map(torch.equal, symmetric_eigs(padded), expected))


def check_not_finite(bad: float, n: int, m: int, device: str) -> None:
    """NaN throughout one of n matrices, and the same bits as without it in the others."""
    a = symmetric(n, m, torch.float32, device)
    expected = symmetric_eigs(a)
    a[3, 4, 1] = bad
    found = symmetric_eigs(a)
    others = torch.arange(n, device=device) != 3
    for part, whole in zip(found, expected, strict=True):
        assert part[3].isnan().all()
        assert part[others].equal(whole[others])


def check_zero_size(shape: tuple[int, ...], device: str) -> None:
    values, vectors = symmetric_eigs(torch.empty(shape, device=device))
    assert values.shape == shape[:2]
    assert vectors.shape == shape


def check_bad(
    shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], sentence: str, device: str
) -> None:
    with pytest.raises(error, match=sentence):
        symmetric_eigs(torch.ones(shape, dtype=dtype, device=device))
