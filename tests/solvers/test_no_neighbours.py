"""splitting_eigs on the spectra whose smallest eigenvalues a Krylov solver confuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import growkernels as gk
from growkernels.solvers.batched_lanczos import solve

D, NEURONS = 64, 1500


def data(kind: str) -> tuple[Tensor, Tensor]:
    rows = 4 * D
    x, w = torch.randn(rows, D), torch.randn(rows, NEURONS)
    if kind == "positive":
        w = w.abs()
    elif kind == "heavy tails":
        x = x * torch.randn(rows, 1).exp() ** 2
    elif kind == "scaled columns":
        x = x * torch.logspace(0, -2, D)
    elif kind == "duplicated rows":
        x = x[torch.randint(rows // 8, (rows,))]
    elif kind == "one-hot":
        x = torch.nn.functional.one_hot(torch.randint(D, (rows,)), D).float()
    return x, w


def smallest(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Every neuron's smallest eigenvalue and |S|, by LAPACK in float64."""
    values = [
        torch.linalg.eigvalsh(torch.einsum("mn,mi,mj->nij", part, x.double(), x.double()))
        for part in w.double().split(500, 1)
    ]
    everything = torch.cat(values)
    return everything[:, 0], everything.abs().amax(1)


@pytest.mark.parametrize("kind", ["normal", "positive", "heavy tails", "scaled columns", "one-hot"])
def test_no_neighbour_takes_the_place_of_the_smallest(kind: str) -> None:
    x, w = data(kind)
    exact, norms = smallest(x, w)
    for tol in (1e-3, 1e-4):
        values, vectors, residuals = gk.splitting_eigs(x, w, tol=tol)
        assert ((values[:, 0] - exact).abs() <= 1e-5 * norms).all()
        assert (residuals <= 1e-5).all()
        assert torch.allclose(vectors.norm(dim=2), torch.ones(()))


@pytest.fixture(params=["high", "medium"])
def reduced_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("reduced_precision")
def test_products_that_torch_may_round_do_not_reach_the_values() -> None:
    x, w = (part[:, :96] for part in data("normal"))
    exact, norms = smallest(x, w)
    values, _, residuals = gk.splitting_eigs(x, w)
    assert ((values[:, 0] - exact).abs() <= 1e-5 * norms).all()
    assert (residuals <= 1e-5).all()


@pytest.mark.usefixtures("reduced_precision")
@pytest.mark.parametrize("k", [1, 3])
def test_nor_do_they_where_no_matrix_is_formed(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(300, 110, generator=generator)
    w = torch.randn(300, 5, generator=generator)
    matrices = torch.einsum("md,mn,me->nde", x.double(), w.double(), x.double())
    exact = torch.linalg.eigvalsh(matrices)
    norms = exact.abs().amax(1, keepdim=True)
    values, _, residuals = gk.splitting_eigs(x, w, k=k)
    assert ((values - exact[:, :k]).abs() <= 1e-4 * norms).all()
    assert (residuals <= 1e-4).all()


def test_matrices_are_formed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded, and nothing else changes."""
    x, w = (part[:, :50] for part in data("positive"))
    whole = gk.splitting_eigs(x, w, k=2)
    monkeypatch.setattr("growkernels.solvers.explicit_matrices._NUMBERS_AT_ONCE", 8 * D**2)
    for part, expected in zip(gk.splitting_eigs(x, w, k=2), whole, strict=True):
        torch.testing.assert_close(part.abs(), expected.abs(), rtol=1e-4, atol=1e-4)


def test_the_smallest_comes_out_of_a_start_that_has_little_of_it() -> None:
    """When the neighbour's residual falls below tol, more than tol / 10 is left of it there."""
    spectrum = torch.cat([torch.tensor([-1.0, -0.9]), torch.linspace(0, 1, 108)])
    start = torch.ones(1, 1, 110)
    start[..., 0] = 1e-3

    def product(v: Tensor) -> Tensor:
        return v * spectrum

    found = solve("solve", start, product, None, iters=None, tol=1e-3)
    assert (found.residuals <= 1e-4).all()
    torch.testing.assert_close(found.values, torch.tensor([[-1.0]]), rtol=0, atol=1e-4)
