"""splitting_eigs and smallest_eigenpairs against explicit splitting matrices and LAPACK."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import growkernels as gk
from growkernels.solvers import batched_lanczos, smallest_eigenpairs, splitting_matrices

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# samples, neurons, features, eigenpairs, tolerance
SIZES = [
    (50, 7, 1, 1, 1e-4),
    (40, 300, 2, 1, 1e-4),
    (50, 30, 3, 3, 1e-4),
    (4, 9, 12, 2, 1e-4),
    (200, 60, 20, 1, 1e-4),
    (200, 40, 20, 4, 1e-4),
    (300, 20, 48, 2, 1e-3),
]


def draw(samples: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, d).to(dtype), torch.randn(samples, n).to(dtype)


def explicit(x: Tensor, w: Tensor) -> Tensor:
    """Every S_i, [n, d, d], in float64."""
    return torch.einsum("mn,mi,mj->nij", w.double(), x.double(), x.double())


def with_spectrum(values: Tensor) -> tuple[Tensor, Tensor]:
    """x and w of neurons whose splitting matrices have the eigenvalues [n, d] given."""
    d = values.shape[1]
    x = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0].to(values.dtype)
    return x, values.T.contiguous()


def check(matrices: Tensor, found: tuple[Tensor, Tensor, Tensor], tol: float) -> None:
    """The pairs are eigenpairs, the smallest ones, and their residuals are told truly."""
    values, vectors, residuals = (part.double() for part in found)
    rounding = 1e-11 if found[0].dtype == torch.float64 else 5e-6
    expected = torch.linalg.eigvalsh(matrices)
    k = values.shape[1]
    norms = expected.abs().amax(1, keepdim=True)
    beside = torch.where(norms > 0, norms, 1)
    assert (values.diff(dim=1) >= 0).all()
    assert ((values - expected[:, :k]).abs() <= (tol + rounding) * norms).all()
    gram = vectors @ vectors.mT
    assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() <= max(rounding, 1e-12)
    true = (vectors @ matrices - values[..., None] * vectors).norm(dim=2) / beside
    assert (true <= tol + rounding).all()
    assert (residuals <= tol).all()
    # |S| is known from below only, so what is reported may be larger than the truth.
    assert (true <= residuals + rounding).all()


@pytest.mark.parametrize(("samples", "n", "d", "k", "tol"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_explicit_matrices(
    samples: int, n: int, d: int, k: int, tol: float, dtype: torch.dtype
) -> None:
    x, w = draw(samples, n, d, dtype)
    found = gk.splitting_eigs(x, w, k, tol=tol)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [part.dtype for part in found] == [wide] * 3
    assert [tuple(part.shape) for part in found] == [(n, k), (n, k, d), (n, k)]
    check(explicit(x, w), found, tol)


@pytest.mark.parametrize("d", [2, 3, 5, 10])
def test_hardly_any_neuron_settles_for_another_eigenvalue(d: int) -> None:
    """Of the solver that knows matrices by their products alone."""
    x, w = draw(3 * d, 2000, d, torch.float32)
    exact = torch.linalg.eigvalsh(explicit(x, w))
    norms = exact.abs().amax(1)
    for k, allowed in ((1, 4), (2, 0)):
        product = partial(gk.splitting_hvp, x, w)
        smallest = smallest_eigenpairs(product, 2000, d, k, tol=1e-3)[0][:, 0]
        assert ((smallest - exact[:, 0]).abs() > 1e-3 * norms).sum() <= allowed


def spectra(d: int = 16) -> dict[str, Tensor]:
    ramp = torch.linspace(-1, 2, d, dtype=torch.float64)
    triple = ramp.clone()
    triple[:3] = -3
    rank_one = torch.zeros(d, dtype=torch.float64)
    rank_one[0] = -2
    outlier = ramp.clone()
    outlier[-1] = 20
    return {
        "ramp": ramp,
        "zero": torch.zeros(d, dtype=torch.float64),
        "triple": triple,
        "all equal": torch.full((d,), -0.7, dtype=torch.float64),
        "rank one": rank_one,
        "positive rank one": -rank_one,
        "two values": torch.where(ramp < 0.5, -1.0, 1.0),
        "outlier": outlier,
        "tiny": 1e-25 * ramp,
        "huge": 1e25 * ramp,
    }


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spectra_with_multiple_zero_tiny_and_huge_eigenvalues(k: int, dtype: torch.dtype) -> None:
    x, w = with_spectrum(torch.stack(list(spectra().values())).to(dtype))
    check(explicit(x, w), gk.splitting_eigs(x, w, k, tol=1e-4), 1e-4)


def test_zero_weights_give_zero_and_a_unit_vector() -> None:
    x, w = draw(30, 4, 9, torch.float32)
    w[:, 2] = 0
    values, vectors, residuals = gk.splitting_eigs(x, w)
    assert values[2] == 0
    assert residuals[2] == 0
    assert vectors[2].norm().item() == pytest.approx(1)
    none = gk.splitting_eigs(x[:0], w[:0], k=2)
    assert none[0].eq(0).all()
    assert none[2].eq(0).all()


@pytest.mark.parametrize("k", [1, 4, 6])
def test_all_eigenpairs_and_no_neurons(k: int) -> None:
    x, w = draw(40, 5, 6, torch.float64)
    check(explicit(x, w), gk.splitting_eigs(x, w, k), 1e-4)
    values, vectors, residuals = gk.splitting_eigs(x, w[:, :0], k)
    assert values.shape == residuals.shape == (0, k)
    assert vectors.shape == (0, k, 6)


def test_an_invariant_subspace_is_exact_at_once() -> None:
    matrices = spectra()
    x, w = with_spectrum(torch.stack([matrices["two values"], matrices["rank one"]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gk.splitting_eigs(x, w, iters=2)
    check(explicit(x, w), found, 1e-12)


def test_strides_do_not_matter() -> None:
    x, w = draw(60, 8, 10, torch.float32)
    plain = gk.splitting_eigs(x, w, k=2)
    strided = gk.splitting_eigs(x.T.contiguous().T, F.pad(w, (2, 3))[:, 2:-3], k=2)
    torch.testing.assert_close(strided[0], plain[0], rtol=1e-5, atol=1e-4)


def test_the_same_seed_gives_the_same_bits() -> None:
    x, w = draw(300, 30, 32, torch.float32)

    def run(generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        torch.randn(3)  # what the global generator has done does not matter
        return gk.splitting_eigs(x, w, iters=200, generator=generator)

    unseeded = run(None)
    for got, want in zip(run(None), unseeded, strict=True):
        assert got.equal(want)
    seeded = [run(torch.Generator().manual_seed(5)) for _ in range(2)]
    for got, want in zip(*seeded, strict=True):
        assert got.equal(want)
    assert not seeded[0][1].equal(unseeded[1])
    torch.testing.assert_close(seeded[0][0], unseeded[0], rtol=1e-4, atol=1e-3)


def test_autocast_changes_nothing() -> None:
    x, w = draw(100, 20, 12, torch.float32)
    x.requires_grad_()
    plain = gk.splitting_eigs(x, w)
    matvec = partial(gk.splitting_hvp, x.detach(), w)
    summed = smallest_eigenpairs(matvec, 20, 12, iters=30, tol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        for part, expected in zip(gk.splitting_eigs(x, w), plain, strict=True):
            assert torch.equal(part, expected)
        again = smallest_eigenpairs(matvec, 20, 12, iters=30, tol=1e-3)
    for part, expected in zip(again, summed, strict=True):
        assert torch.equal(part, expected)


def test_neurons_that_have_converged_are_retired() -> None:
    d = 64
    easy = torch.linspace(0, 1, d)
    easy[0] = -50
    x, w = with_spectrum(torch.stack([easy] * 6 + [torch.linspace(0, 1, d)] * 2))
    seen: list[list[int]] = []

    def product(neurons: Tensor, v: Tensor) -> Tensor:
        seen.append(neurons.tolist())
        return gk.splitting_hvp(x, w[:, neurons], v)

    everyone = torch.arange(8)
    found = smallest_eigenpairs(
        partial(product, everyone), 8, d, tol=1e-5, select=lambda rest: partial(product, rest)
    )
    check(explicit(x, w), found, 1e-5)
    assert [6, 7] in seen
    steps = len(seen)
    assert sum(map(len, seen)) < 0.5 * 8 * steps
    together = smallest_eigenpairs(partial(product, everyone), 8, d, tol=1e-5)
    assert len(seen) == 2 * steps
    torch.testing.assert_close(found[0], together[0], rtol=1e-5, atol=1e-5)


def test_sums_over_batches() -> None:
    x, w = draw(90, 12, 14, torch.float64)
    batches = list(zip(x.split(30), w.split(30), strict=True))

    def product(v: Tensor) -> Tensor:
        return torch.stack([gk.splitting_hvp(*batch, v) for batch in batches]).sum(0)

    check(explicit(x, w), smallest_eigenpairs(product, 12, 14, 2, dtype=torch.float64), 1e-4)


def test_filters_of_a_convolution() -> None:
    x, w = torch.randn(2, 3, 6, 7), torch.randn(2, 5, 3, 4)
    params = {"stride": 2, "padding": 1}

    def product(v: Tensor) -> Tensor:
        return gk.splitting_hvp_conv2d(x, w, v.unflatten(2, (3, 3, 3)), **params).flatten(2)

    found = smallest_eigenpairs(product, 5, 27, 2)
    patches = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
    check(explicit(patches, w.flatten(2).transpose(1, 2).flatten(0, 1)), found, 1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_nothing_is_read_back_where_the_loop_is_fixed(k: int) -> None:
    """On the meta device there is nothing that could be read."""
    start = torch.empty(5, k, 40, device="meta")
    calls: list[int] = []

    def product(v: Tensor) -> Tensor:
        calls.append(len(v))
        return v * 2

    found = batched_lanczos.solve("solve", start, product, None, iters=20, tol=1e-4)
    assert calls == [5] * 20
    assert found.vectors.shape == (5, k, 40)


class NoHostReads(TorchDispatchMode):
    """Raises where the host reads a tensor, or waits for a size that depends on one."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select")
        if op.name().removeprefix("aten::").split(".")[0] in read:
            raise AssertionError(f"{op.name()} reads a tensor on the host")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [1, 3])
def test_the_loop_without_host_reads_agrees_with_the_one_that_retires(k: int) -> None:
    x, w = draw(300, 40, 24, torch.float64)
    start = torch.randn(40, k, 24, dtype=torch.float64)
    products = splitting_matrices._products(x, w)
    with NoHostReads():
        fixed = batched_lanczos.solve("", start, *products, iters=60, tol=1e-8, adaptive=False)
    check(explicit(x, w), tuple(fixed), 1e-8)
    retiring = batched_lanczos.solve("", start, *products, iters=200, tol=1e-8)
    torch.testing.assert_close(fixed.values, retiring.values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        (fixed.vectors * retiring.vectors).sum(2).abs(), torch.ones(40, k, dtype=torch.float64)
    )
    with NoHostReads(), pytest.raises(AssertionError, match="reads a tensor on the host"):
        batched_lanczos.solve("", start, *products, iters=60, tol=1e-8)


@pytest.mark.parametrize("which", ["x", "w"])
def test_values_are_differentiable(which: str) -> None:
    x, w = draw(40, 6, 8, torch.float64)
    operand = {"x": x, "w": w}[which].requires_grad_()
    values, vectors, residuals = gk.splitting_eigs(x, w, k=2, tol=1e-9)
    assert not vectors.requires_grad
    assert not residuals.requires_grad
    weights = torch.randn(6, 2, dtype=torch.float64)
    (ours,) = torch.autograd.grad((values * weights).sum(), operand)
    exact = torch.linalg.eigvalsh(explicit(x, w))[:, :2]
    (expected,) = torch.autograd.grad((exact * weights).sum(), operand)
    torch.testing.assert_close(values, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert not gk.splitting_eigs(x, w)[0].requires_grad
    half = {"x": x, "w": w} | {which: operand.detach().bfloat16().requires_grad_()}
    narrow = gk.splitting_eigs(half["x"].bfloat16(), half["w"].bfloat16())[0]
    exact_half = torch.linalg.eigvalsh(explicit(x.bfloat16(), w.bfloat16()))[:, :1]
    torch.testing.assert_close(narrow.double(), exact_half, rtol=1e-5, atol=1e-4)
    narrow.sum().backward()
    assert half[which].grad is not None


def test_too_few_steps_are_a_warning_with_the_numbers() -> None:
    x, w = draw(400, 9, 80, torch.float32)
    w[:, 4] = 0
    message = (
        r"8 of 9 neurons have not converged to tol=1e-05 within 4 steps, .* raise iters or tol"
    )
    with pytest.warns(RuntimeWarning, match=message):
        values, vectors, residuals = gk.splitting_eigs(x, w, iters=4, tol=1e-5)
    matrices = explicit(x, w)
    error = (vectors.double() @ matrices - values.double()[..., None] * vectors).norm(dim=2)
    norms = torch.linalg.eigvalsh(matrices).abs().amax(1, keepdim=True).clamp_min(1e-9)
    assert (error / norms <= residuals + 1e-6).all()
    assert residuals[4] == 0


def test_a_tolerance_below_rounding_is_a_warning() -> None:
    x, w = draw(100, 3, 30, torch.float32)
    with pytest.warns(RuntimeWarning, match=r"pass a larger tol, as torch.float32 resolves"):
        gk.splitting_eigs(x, w, iters=30, tol=1e-9)


BAD_INPUT: list[tuple[type[Exception], str, Callable[[Tensor, Tensor], object]]] = [
    (
        ValueError,
        r"k=7, but S is 6 x 6; ask for at",
        lambda x, w: gk.splitting_eigs(x, w, 7),
    ),
    (ValueError, r"k=0; ask for at least one", lambda x, w: gk.splitting_eigs(x, w, 0)),
    (ValueError, r"iters=0; allow at least one", lambda x, w: gk.splitting_eigs(x, w, iters=0)),
    (ValueError, r"tol=0; it is relative", lambda x, w: gk.splitting_eigs(x, w, tol=0)),
    (ValueError, r"tol=nan; it is", lambda x, w: gk.splitting_eigs(x, w, tol=math.nan)),
    (ValueError, r"the same M", lambda x, w: gk.splitting_eigs(x[1:], w)),
    (ValueError, r"x \[M, d\] and w \[M, n\]", lambda x, w: gk.splitting_eigs(x[0], w)),
    (ValueError, r"w is on meta", lambda x, w: gk.splitting_eigs(x, w.to("meta"))),
    (TypeError, r"pass both in float32", lambda x, w: gk.splitting_eigs(x, w.double())),
    (TypeError, r"pass both in float32", lambda x, w: gk.splitting_eigs(x.int(), w.int())),
    (ValueError, r"n=-1, d=3; sizes", lambda x, w: smallest_eigenpairs(abs, -1, 3)),
    (
        TypeError,
        r"torch.bfloat16; use torch.float32",
        lambda x, w: smallest_eigenpairs(abs, 2, 3, dtype=torch.bfloat16),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD_INPUT)
def test_bad_input_is_refused_in_one_sentence(
    error: type[Exception], message: str, call: Callable[[Tensor, Tensor], object]
) -> None:
    x, w = draw(20, 4, 6, torch.float32)
    with pytest.raises(error, match=message):
        call(x, w)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    x, w = draw(20, 4, 6, torch.float32)
    w[3, 2] = bad
    with pytest.raises(
        ValueError, match=r"not finite for 1 of 4 neurons, .* neuron 2; look for NaN"
    ):
        gk.splitting_eigs(x, w)
    x[0, 0] = bad
    with pytest.raises(ValueError, match=r"not finite for 4 of 4 neurons"):
        gk.splitting_eigs(x, torch.ones_like(w))
