"""Smallest eigenpairs of all neurons' splitting matrices."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from growkernels.ops import splitting_hvp
from growkernels.ops.arguments import check_tensors
from growkernels.ops.splitting import wide_product
from growkernels.solvers.batched_lanczos import (
    Matvec,
    Select,
    check_request,
    random_start,
    solve,
    warn_unless_converged,
)
from growkernels.solvers.explicit_matrices import can_form, solve_formed
from growkernels.solvers.precision import without_autocast

_NAME = "splitting_eigs"
# Products to 2^-16 of |S| are good enough on a GPU from here on.
_WIDE_TOL = 1e-4


def splitting_eigs(
    x: Tensor,
    w: Tensor,
    k: int = 1,
    iters: int | None = None,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k smallest eigenpairs of every neuron's splitting matrix S_i = sum_m w[m,i] x_m x_m^T.

    Up to d = 96 the matrices are formed, d^2 numbers for each of some thousand neurons at a time,
    and solved for one by one: whatever the data, no neighbour takes the place of the smallest.
    Beyond, and with `iters`, no S_i is formed: all neurons advance together by
    `growkernels.solvers.smallest_eigenpairs` on `splitting_hvp`.

    Args:
        x: [M, d], the layer's inputs. float32 or float64; bfloat16 and float16 are solved for in
            float32. Any strides. Under autocast as without it.
        w: [M, n], see `growkernels.splitting_weight`; the dtype and device of `x`.
        k: eigenpairs wanted of each neuron, at most d.
        iters: the most steps, one product with S each, where no S_i is formed; 200 on the CPU,
            where the solver stops as soon as all neurons have converged and those that have cost
            nothing further. On other devices exactly so many steps are taken, 64 unless given.
        tol: converged is |S v - lambda v| <= tol * |S|, with the largest |Ritz value| seen for |S|,
            which never exceeds it. The CPU takes those steps on to a tenth of `tol`, as far as the
            dtype resolves that, so that a neighbouring eigenpair seldom passes for the smallest.
        generator: for the start vectors of those steps, on the device of `x`; None means a fixed
            seed. The same seed gives the same bits on the same machine with the same number of
            threads.

    Returns:
        values [n, k] ascending, vectors [n, k, d] orthonormal and of either sign, residuals [n, k],
        |S v - lambda v| / |S|, zero where S is zero. float64 for float64 inputs, else float32.

    Where x or w requires grad, the values are differentiable, once: d lambda = v^T dS v, which
    holds for eigenvalues that occur once. Vectors and residuals are not. A RuntimeWarning tells how
    many neurons have not converged, and how far from it they are. Raises ValueError for shapes and
    numbers that do not fit and, on the CPU, for NaN and infinity (elsewhere such neurons return
    NaN); TypeError for dtypes.
    """
    check_tensors(_NAME, x=x, w=w)
    _check_inputs(x, w)
    check_request(_NAME, w.shape[1], x.shape[1], k, iters, tol)
    rows, weights = (t.float() if t.dtype.itemsize == 2 else t for t in (x, w))
    with torch.no_grad(), without_autocast(x.device):
        start = random_start(w.shape[1], k, x.shape[1], generator, x.device, rows.dtype)
        if iters is None and can_form(x.shape[1]):
            solution = solve_formed(_NAME, rows, weights, k)
        else:
            wide = wide_product(x, w) if tol >= _WIDE_TOL else None
            products = (wide, None) if wide else _products(rows, weights)
            solution = solve(_NAME, start, *products, iters=iters, tol=tol)
    warn_unless_converged(_NAME, solution.residuals, iters, tol)
    values, vectors, residuals = solution
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        with without_autocast(x.device):
            values = (vectors * splitting_hvp(rows, weights, vectors, full_precision=True)).sum(2)
    return values, vectors, residuals


def _check_inputs(x: Tensor, w: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 2 or len(x) != len(w):
        raise ValueError(
            f"{_NAME}: got x of shape {list(x.shape)} and w of shape {list(w.shape)}; pass "
            f"x [M, d] and w [M, n] with the same M"
        )
    if not x.is_floating_point() or x.dtype != w.dtype:
        raise TypeError(
            f"{_NAME}: got x of dtype {x.dtype} and w of dtype {w.dtype}; pass both in float32, "
            f"float64, bfloat16 or float16"
        )
    if x.device != w.device:
        raise ValueError(f"{_NAME}: x is on {x.device} but w is on {w.device}; move one of them")


def _products(x: Tensor, w: Tensor) -> tuple[Matvec, Select]:
    """S v for all neurons, and what makes it for some."""
    product = partial(splitting_hvp, full_precision=True)
    return partial(product, x, w), lambda neurons: partial(product, x, w.index_select(1, neurons))
