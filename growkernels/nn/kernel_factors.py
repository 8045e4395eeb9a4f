"""Writing a kernel matrix W [Cout, K], K = Cin kh kw, as the factors of a basis convolution.

The factors are a basis B [R, K] and coefficients A: W = [B; A B] with A [Cout - R, R] where the
basis filters' own outputs are the first channels, else W = A B with A [Cout, R]. Everything here
takes and returns float64 matrices on the CPU, so a factorisation does not depend on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The squared error that well-conditioned coefficients may cost, relative to the smallest one.
EXCESS = 0.01


def kernel_matrix(basis: Tensor, coeff: Tensor, include_basis: bool) -> Tensor:
    """W [Cout, K] of the factors."""
    mixed = coeff @ basis
    return torch.cat([basis, mixed]) if include_basis else mixed


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) with A B the best approximation of W of this rank (Eckart and Young, 1936).

    With W = U S Vᵀ: A = U √S and B = √S Vᵀ, so gradients of the two factors are of one size. Where
    S is zero, A is zero and the filter in B is not, so that training can still make use of it.
    """
    left, values, right = _svd(matrix)
    kept = min(rank, len(values))
    left, values, right = left[:, :kept], values[:kept], right[:kept]
    nonzero = values > _threshold(values, matrix)
    scale = torch.where(nonzero, values, 1.0).sqrt()
    basis = matrix.new_zeros(rank, matrix.shape[1])
    coeff = matrix.new_zeros(matrix.shape[0], rank)
    basis[:kept] = scale[:, None] * right
    coeff[:, :kept] = left * torch.where(nonzero, values / scale, 0.0)
    return basis, coeff


def leading_rows_factors(matrix: Tensor, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    """(B, A) with [B; A B] near the best approximation of W of this rank, and A not large.

    Let U [Cout, R] span the columns of the best approximation W_R. The form reaches every W_R whose
    first R rows are independent: B is those rows, A = U_rest U_top⁻¹. Nothing makes U_top well
    conditioned though (for random kernels with R = Cout/2, |A| is of order R; where the first rows
    are dependent, no A gives W_R), and with a large A rounding errors and training steps in B are
    magnified, the steps by |A|². So the singular values of U_top, the cosines c of the angles
    between the columns of W_R and the first R coordinates, are raised to a least value: the column
    space is turned by the smallest angles for which |A| <= bound, and B is the least-squares
    optimum for that A. The bound is the first of 1, 2, 4, ... for which the squared error is at
    most 1 % above that of W_R, or for which the error vanishes beside the rounding error `eps` of
    the parameters. Hence a W of rank <= R is reproduced to that precision, if the bound it takes
    is not above eps**-0.5: there clipping and rounding would cost the same.
    """
    left, values, right = _svd(matrix)
    rows = left * values  # W in the orthonormal coordinates given by `right`
    best = float(values[rank:].square().sum())
    allowed = (1.0 + EXCESS) * best + eps**2 * float(values.square().sum())
    span = left[:, : min(rank, int((values > _threshold(values, matrix)).sum()))]
    top, cosines, turned = torch.linalg.svd(span[:rank], full_matrices=False)
    rest = span[rank:] @ turned.T
    sines = rest.norm(dim=0)
    for exponent in range(int(-math.log2(eps) / 2) + 1):
        least = (1.0 + 4.0**exponent) ** -0.5
        clipped = cosines < least
        raised = torch.where(clipped, least, cosines)
        lowered = torch.where(clipped, (1.0 - least**2) ** 0.5 / sines, 1.0)
        below = rest * lowered
        columns = torch.cat([top * raised, below])  # orthonormal again
        basis = (top * raised) @ (columns.T @ rows)
        coeff = (below / raised) @ top.T
        error = float((rows - kernel_matrix(basis, coeff, True)).square().sum())
        if error <= allowed:
            break
    return basis @ right, coeff


def selected_rows_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) with B made of rows of W, and A B the closest to W that these rows can give.

    The rows are chosen by pivoting: each is the one farthest from the span of those before it
    (Businger and Golub, 1965). They keep their order; their rows of A are unit vectors.
    """
    rows = torch.linalg.qr(matrix.T, mode="r").R.T  # the same lengths and angles, fewer columns
    residual = rows.clone()
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for _ in range(rank):
        distances = residual.square().sum(1)
        pivot = int(torch.where(free, distances, -1.0).argmax())
        free[pivot] = False
        if distances[pivot] > 0:
            direction = residual[pivot] / distances[pivot].sqrt()
            residual -= torch.outer(residual @ direction, direction)
    chosen = (~free).nonzero()[:, 0]
    coeff = matrix.new_zeros(len(rows), rank)
    coeff[chosen] = torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
    coeff[free] = rows[free] @ torch.linalg.pinv(rows[chosen])
    return matrix[chosen], coeff


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Kernel matrices are wide; LAPACK takes several times as long for wide ones as for tall ones.
    right, values, left = torch.linalg.svd(matrix.T, full_matrices=False)
    return left.T, values, right.T


def _threshold(values: Tensor, matrix: Tensor) -> float:
    """The singular values up to this one are rounding errors."""
    return float(values.max()) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
