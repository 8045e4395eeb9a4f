"""Eigenpairs of many symmetric matrices at once: small ones themselves, large ones step by step.

The two ops belong to the solvers of `growkernels.solvers`: `symmetric_eigs` solves the projection
of every matrix on its search space, `search_space_step_` is a whole step of the batched Lanczos
solver in one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "SEARCH_SPACE_BLOCKS",
    "has_search_space_step",
    "search_space_step_",
    "symmetric_eigs",
]

# A full basis of the batched Lanczos solver has so many blocks of k directions.
SEARCH_SPACE_BLOCKS: int = torch.ops.growkernels.search_space_blocks()

_symmetric_eigs = torch.ops.growkernels.symmetric_eigs.default
_search_space_step = torch.ops.growkernels.search_space_step_.default
# Registers hold what a step needs of blocks of one and of two directions.
_LARGEST_BLOCK = 2


def symmetric_eigs(a: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """All eigenpairs of n small symmetric matrices, or the k smallest, computed in float64.

    All by cyclic Jacobi rotations; on the CPU up to a quarter of them by Householder's tridiagonal
    form, bisection and inverse iteration, at a tenth of the time for 64 rows. No eigenvalue is
    ever passed over.

    The results of a matrix do not depend on the others beside it. On a GPU the host waits for
    nothing up to 256 rows; larger matrices, and devices without a kernel, are left to
    `torch.linalg.eigh`. Golub and Van Loan, "Matrix Computations", section 8.5.

    Args:
        a: [n, m, m], float32 or float64, any strides; the lower triangles are read.
        k: how many eigenpairs, 1 to m; None means all.

    Returns:
        values [n, k], ascending, and vectors [n, k, m] with the unit eigenvector i in row i, in the
        dtype of `a`. NaN throughout for a matrix that is not finite.

    Not differentiable: a backward pass through it raises RuntimeError. Raises ValueError for
    another shape or k, TypeError for another dtype.
    """
    values, vectors = _symmetric_eigs(a, k)
    return values, vectors


def has_search_space_step(device: torch.device, k: int) -> bool:
    """Whether `search_space_step_` has a kernel for `device` and blocks of `k` directions."""
    name = "growkernels::search_space_step_"
    return (
        device.type == "cuda"
        and k <= _LARGEST_BLOCK
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    )


def search_space_step_(
    basis: Tensor,
    images: Tensor,
    projected: Tensor,
    previous: Tensor,
    dead: Tensor,
    norms: Tensor,
    units: Tensor,
    product: Tensor,
    count: int,
) -> None:
    """One step of the batched Lanczos solver for n symmetric matrices S, in one kernel.

    Takes S applied to the newest directions, finds the Ritz pairs, cuts a full basis down and makes
    the residuals the next directions: what `growkernels.solvers.search_space.SearchSpace` does in
    `extend` and `add`, on the same state, which is changed in place. A basis holds
    6 k = SEARCH_SPACE_BLOCKS * k columns, and 2 k + 1 of them are left once it is full.

    Args:
        basis, images: [n, 6 k, d], the directions and S applied to them in units of `units`.
            float32 or float64.
        projected: [n, 6 k, 6 k] float64, the lower triangle of S projected on the basis.
        previous: [n, k, 6 k] float64, the last Ritz vectors' coordinates in the basis.
        dead: [n, 6 k] bool, columns that are zero as the directions ran out.
        norms, units: [n], the largest |Ritz value| seen and the largest element of the first
            product, in the dtype of the basis.
        product: [n, k, d], S applied to columns count to count + k of the basis; k of 1 or 2.
        count: columns whose images are known already.

    All of the state is contiguous and on one GPU. Not differentiable. Raises ValueError for sizes,
    RuntimeError for a state that does not fit `product`, NotImplementedError where there is no
    kernel: see `has_search_space_step`.
    """
    _search_space_step(basis, images, projected, previous, dead, norms, units, product, count)
