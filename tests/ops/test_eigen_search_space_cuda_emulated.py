"""The CUDA kernel of a step of the Lanczos solver, executed on the host by the launch shim.

The oracle is the same step in plain torch: `SearchSpace` on the CPU. Directions may differ in sign,
so what is compared is what the state stands for: Ritz values, and vectors and residuals up to sign.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from host_compiler import HERE, HostCompiler, HostLibrary
from op_samples.eigen import symmetric
from torch import Tensor

from growkernels.solvers.search_space import SearchSpace


@pytest.fixture(scope="module")
def kernels(host_compiler: HostCompiler) -> HostLibrary:
    return host_compiler(HERE / "search_space.cpp")


def advance(kernels: HostLibrary, space: SearchSpace, product: Tensor, threads: int = 64) -> None:
    """`SearchSpace.advance` on a GPU."""
    n, k, d = product.shape
    kernels.call(
        {torch.float32: "step_float32", torch.float64: "step_float64"}[product.dtype],
        *(space._basis, space._images, space._projected, space._previous, space._dead),
        *(space.norms, space.unit, product, n, k, d, space.count, threads),
    )
    space.count += k
    if space.full:
        space.count = 2 * k + 1


def compare(
    kernels: HostLibrary, a: Tensor, k: int, steps: int, error: float, threads: int = 64
) -> None:
    """Both take the same steps; each time the Ritz pairs of both are compared."""
    start = torch.randn(len(a), k, a.shape[1], dtype=a.dtype)
    plain, fused = SearchSpace(start), SearchSpace(start)
    scale = a.abs().amax((1, 2)).clamp_min(torch.finfo(a.dtype).tiny)
    for _ in range(steps):
        product = fused.direction @ a
        expected = plain.extend(plain.direction @ a)
        # The kernel's state is read by the plain form, as the solver's last step does.
        found = copy.deepcopy(fused).extend(product)
        assert ((found.values - expected.values).abs() <= 10 * error * scale[:, None]).all()
        assert (found.vectors.abs() - expected.vectors.abs()).abs().max() <= 1e3 * error
        assert (found.residuals.abs() - expected.residuals.abs()).abs().max() <= 1e3 * error
        plain.add(expected.residuals)
        advance(kernels, fused, product, threads)
        assert fused.count == plain.count
        used = slice(0, fused.count + k)
        assert fused._dead[:, used].equal(plain._dead[:, used])
        basis = fused._basis[:, used]
        live = torch.diag_embed((~fused._dead[:, used]).to(a.dtype))
        assert (basis @ basis.mT - live).abs().max() <= 100 * error
        assert ((fused.norms - plain.norms).abs() <= 10 * error * scale / plain.unit).all()
        assert ((fused.unit - plain.unit).abs() <= 10 * error * plain.unit).all()


@pytest.mark.parametrize(("k", "d"), [(1, 40), (2, 40), (1, 97), (2, 97), (1, 300)])
def test_steps_and_restarts(kernels: HostLibrary, k: int, d: int) -> None:
    compare(kernels, symmetric(4, d, torch.float64), k, 12, 1e-13)


@pytest.mark.parametrize("k", [1, 2])
def test_float32(kernels: HostLibrary, k: int) -> None:
    compare(kernels, symmetric(4, 70, torch.float32), k, 10, 1e-6)
    compare(kernels, symmetric(4, 72, torch.float32), k, 10, 1e-6)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_matrices(kernels: HostLibrary, k: int, size: float) -> None:
    compare(kernels, size * symmetric(2, 50, torch.float32), k, 10, 1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_directions_run_out(kernels: HostLibrary, k: int) -> None:
    """Spaces that become invariant under S: S of low rank, S = 0, S = 1, and all of R^d."""
    d = 30
    low = torch.randn(d, k, dtype=torch.float64)
    a = torch.stack(
        [low @ low.mT, torch.zeros(d, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)]
    )
    start = torch.randn(3, k, d, dtype=torch.float64)
    space = SearchSpace(start)
    for _ in range(12):
        advance(kernels, space, space.direction @ a)
    assert space._dead[1:, k : space.count + k].all()
    values = space.extend(space.direction @ a).values
    torch.testing.assert_close(values[1], torch.zeros(k, dtype=torch.float64))
    torch.testing.assert_close(values[2], torch.ones(k, dtype=torch.float64))
    assert values[0].abs().max() <= 1e-12

    whole = symmetric(3, 6, torch.float64)
    space = SearchSpace(torch.randn(3, k, 6, dtype=torch.float64))
    for _ in range(20):
        advance(kernels, space, space.direction @ whole)
    pairs = space.extend(space.direction @ whole)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(whole)[:, :k])
    exact = pairs.vectors @ whole
    torch.testing.assert_close(exact, pairs.values[..., None] * pairs.vectors)


@pytest.mark.parametrize("k", [1, 2])
def test_converges_to_the_smallest_eigenpairs(kernels: HostLibrary, k: int) -> None:
    a = symmetric(3, 64, torch.float32)
    space = SearchSpace(torch.randn(3, k, 64))
    for _ in range(60):
        advance(kernels, space, space.direction @ a)
        # As residuals shrink, only a second pass keeps directions orthogonal.
        basis, dead = (state[:, : space.count + k] for state in (space._basis, space._dead))
        assert (basis @ basis.mT - torch.diag_embed((~dead).float())).abs().max() <= 1e-5
    values = space.extend(space.direction @ a).values
    exact = torch.linalg.eigvalsh(a.double())
    assert ((values - exact[:, :k]).abs() <= 1e-5 * exact.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("k", [1, 2])
def test_nan_stays_with_its_neuron(kernels: HostLibrary, k: int) -> None:
    a = symmetric(3, 20, torch.float64)
    start = torch.randn(3, k, 20, dtype=torch.float64)
    clean, spoilt = SearchSpace(start), SearchSpace(start)
    for step in range(9):
        for space in (clean, spoilt):
            product = space.direction @ a
            if space is spoilt and step == 2:
                product[1, -1, 7] = math.nan
            advance(kernels, space, product)
    expected = clean.extend(clean.direction @ a).values
    values = spoilt.extend(spoilt.direction @ a).values
    assert values[1].isnan().all()
    assert values[[0, 2]].equal(expected[[0, 2]])


@pytest.mark.parametrize("k", [1, 2])
def test_the_order_of_threads_does_not_matter(kernels: HostLibrary, k: int) -> None:
    """Bit for bit; and another number of threads changes nothing but rounding."""
    a = symmetric(2, 70, torch.float64)
    start = torch.randn(2, k, 70, dtype=torch.float64)
    one, other = SearchSpace(start), SearchSpace(start)
    for _ in range(9):
        advance(kernels, one, one.direction @ a)
        with kernels.backwards():
            advance(kernels, other, other.direction @ a)
    for name in ("_basis", "_images", "_projected", "_previous", "_dead", "norms", "unit"):
        got, want = getattr(other, name), getattr(one, name)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), name
    compare(kernels, a, k, 9, 1e-13, threads=256)
