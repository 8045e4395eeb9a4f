"""splitting_eigs on a GPU, against explicit splitting matrices in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import gpu
from growkernels.solvers import batched_lanczos

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(samples: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, w = torch.randn(samples, d, device="cuda"), torch.randn(samples, n, device="cuda")
    return x.to(dtype), w.to(dtype)


def explicit(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("mn,mi,mj->nij", w.double(), x.double(), x.double())


def check(matrices: Tensor, found: tuple[Tensor, Tensor, Tensor], tol: float) -> None:
    values, vectors, residuals = (part.double() for part in found)
    exact = torch.linalg.eigvalsh(matrices)
    norms = exact.abs().amax(1, keepdim=True)
    assert (residuals <= tol).all()
    assert ((values - exact[:, : values.shape[1]]).abs() <= 1.1 * tol * norms).all()
    true = (vectors @ matrices - values[..., None] * vectors).norm(dim=2)
    assert (true <= 1.2 * tol * norms).all()
    gram = vectors @ vectors.mT
    assert (gram - torch.eye(values.shape[1], device="cuda", dtype=gram.dtype)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_against_explicit_matrices(k: int, dtype: torch.dtype) -> None:
    x, w = draw(400, 60, 24, dtype)
    check(explicit(x, w), gk.splitting_eigs(x, w, k, tol=1e-3), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_a_transformer(dtype: torch.dtype) -> None:
    x, w = draw(2000, 300, 384, dtype)
    found = gk.splitting_eigs(x, w, tol=1e-3, iters=200)
    check(explicit(x, w), found, 1e-3)


def test_a_small_tolerance_is_solved_for_in_float32() -> None:
    x, w = draw(200, 20, 12, torch.bfloat16)
    check(explicit(x, w), gk.splitting_eigs(x, w, tol=2e-6), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_wide_products_keep_16_bits(k: int, dtype: torch.dtype) -> None:
    x, w = draw(3001, 131, 100, dtype)
    v = torch.randn(131, k, 100, device="cuda")
    product = gpu.wide_product(x, w)
    assert product is not None
    exact = torch.einsum("nij,nkj->nki", explicit(x, w), v.double())
    assert (product(v).double() - exact).norm() < 2**-15 * exact.norm()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_same_bits_and_the_loop_waits_for_nothing(
    k: int,
    no_host_sync: Callable[[], AbstractContextManager[None]],
    replayed: Callable[[Callable[[], Any]], Any],
) -> None:
    x, w = draw(500, 64, 48, torch.bfloat16)
    product = gpu.wide_product(x, w)
    assert product is not None
    start = torch.randn(64, k, 48, device="cuda")
    solve = partial(batched_lanczos.solve, "", start, product, None, iters=20, tol=1e-3)
    first = solve()
    with no_host_sync():
        second = solve()
    for again in (second, replayed(solve)):
        for part, expected in zip(again, first, strict=True):
            assert part.equal(expected)


def test_the_warning_is_the_one_look_from_the_host() -> None:
    x, w = draw(400, 9, 80, torch.float32)
    with pytest.warns(RuntimeWarning, match=r"9 of 9 neurons have not converged .* 3 steps"):
        gk.splitting_eigs(x, w, iters=3, tol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.splitting_eigs(x, w[:, :0])


def test_nan_is_returned_for_the_neuron_it_belongs_to() -> None:
    x, w = draw(100, 8, 12, torch.float32)
    w[3, 2] = float("nan")
    with pytest.warns(RuntimeWarning, match=r"1 of 8 neurons"):
        values = gk.splitting_eigs(x, w, tol=1e-3)[0]
    assert values[2].isnan().all()
    assert values[[0, 1, 3, 4, 5, 6, 7]].isfinite().all()
