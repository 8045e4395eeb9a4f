"""symmetric_eigs for the few smallest eigenpairs: a kernel of its own on the CPU."""

from __future__ import annotations

import pytest
import torch
from op_samples.eigen import DTYPES, NOT_FINITE, symmetric
from torch import Tensor
from torch.library import opcheck

from growkernels.ops.eigen import symmetric_eigs


def spectra(m: int) -> Tensor:
    """[8, m, m] float64: no gaps, multiple and vanishing eigenvalues, blocks, the range's ends."""
    random = symmetric(1, m, torch.float64)[0]
    blocks = random.clone()
    half = m // 2
    blocks[half:, :half] = blocks[:half, half:] = 0
    blocks[half : 2 * half, half : 2 * half] = blocks[:half, :half]
    low_rank = torch.randn(m, 2, dtype=torch.float64)
    ones = torch.ones(m - 1, dtype=torch.float64)
    wilkinson = torch.diag_embed(-(torch.arange(m) - m // 2).abs().double())
    wilkinson += torch.diag(ones, 1) + torch.diag(ones, -1)
    matrices = [
        random,
        torch.zeros(m, m, dtype=torch.float64),
        -0.7 * torch.eye(m, dtype=torch.float64),
        -low_rank @ low_rank.T,
        blocks,
        wilkinson,
        1e-30 * random,
        1e30 * random,
    ]
    return torch.stack(matrices)


def check_smallest(a: Tensor, k: int) -> None:
    values, rows = symmetric_eigs(a, k)
    assert values.shape == (len(a), k)
    assert rows.shape == (len(a), k, a.shape[1])
    assert values.dtype == rows.dtype == a.dtype
    exact, values, rows = a.double(), values.double(), rows.double()
    expected = torch.linalg.eigvalsh(exact)
    scale = expected.abs().amax(1, keepdim=True)
    error = 64 * torch.finfo(a.dtype).eps
    assert ((values - expected[:, :k]).abs() <= error * scale).all()
    assert (values.diff(dim=1) >= 0).all()
    residuals = (rows @ exact - values[..., None] * rows).norm(dim=2)
    assert (residuals <= error * scale).all()
    assert (rows @ rows.mT - torch.eye(k, dtype=torch.float64)).abs().max() <= error


@pytest.mark.parametrize(("m", "k"), [(4, 1), (9, 2), (24, 6), (33, 1), (64, 3), (24, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_of_every_spectrum(m: int, k: int, dtype: torch.dtype) -> None:
    check_smallest(spectra(m).to(dtype), k)


def test_no_matrix_depends_on_its_neighbours() -> None:
    a = symmetric(19, 21, torch.float32)
    a[11] *= 1e20
    together = symmetric_eigs(a, 2)
    for i in (0, 7, 8, 18):
        for got, want in zip(symmetric_eigs(a[i : i + 1], 2), together, strict=True):
            assert got[0].equal(want[i])


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_what_is_not_finite_gives_nan_in_its_own_matrix_alone(bad: float) -> None:
    a = symmetric(9, 12, torch.float32)
    expected = symmetric_eigs(a, 1)
    a[3, 4, 1] = bad
    others = torch.arange(9) != 3
    for part, whole in zip(symmetric_eigs(a, 1), expected, strict=True):
        assert part[3].isnan().all()
        assert part[others].equal(whole[others])


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_more_pairs_than_there_are_is_refused(k: int, device: str) -> None:
    with pytest.raises(ValueError, match=rf"got k={k} for matrices of 5 rows; ask for 1 to 5"):
        symmetric_eigs(torch.ones(2, 5, 5, device=device), k)


@pytest.mark.parametrize("k", [1, 7])
def test_opcheck(k: int) -> None:
    opcheck(torch.ops.growkernels.symmetric_eigs.default, (symmetric(3, 9, torch.float32), k))
    assert symmetric_eigs(torch.empty(0, 9, 9), k)[1].shape == (0, k, 9)
