"""Smallest eigenpairs of splitting matrices that are small enough to be formed."""

from __future__ import annotations

import torch
from torch import Tensor

from growkernels.ops.eigen import symmetric_eigs
from growkernels.solvers.batched_lanczos import Solution, check_finite
from growkernels.solvers.precision import bmm, rounds_products

# Forming a matrix costs d / 4 products with a vector, gapless spectra take 16 to 50 of them.
_LARGEST_FORMED = 96
# Columns of products of two features that are made at a time, and numbers in them.
_COLUMNS = 16
_PRODUCTS_AT_ONCE = 2**19
# Numbers in the matrices that are formed at a time.
_NUMBERS_AT_ONCE = 2**24


def can_form(d: int) -> bool:
    """Whether forming d x d matrices costs about what a solve by products with vectors does."""
    return d <= _LARGEST_FORMED


def form(x: Tensor, w: Tensor) -> Tensor:
    """S_i = sum_m w[m, i] x_m x_m^T for x [M, d] and w [M, n]: [n, d, d].

    One matrix product for all neurons, of w with products of two features.
    """
    n, d = w.shape[1], x.shape[1]
    matrices = x.new_empty(n, d, d)
    for first in range(0, d, _COLUMNS):
        width = min(_COLUMNS, d - first)
        block = x.new_zeros(n, width * (d - first))
        size = max(1, _PRODUCTS_AT_ONCE // block.shape[1])
        for rows, weights in zip(x.split(size), w.split(size), strict=True):
            pairs = rows[:, first : first + width, None] * rows[:, None, first:]
            block.addmm_(weights.mT, pairs.flatten(1))
        strip = block.view(n, width, d - first)
        matrices[:, first : first + width, first:] = strip
        matrices[:, first:, first : first + width] = strip.mT
    return matrices


def solve_formed(name: str, x: Tensor, w: Tensor, k: int) -> Solution:
    """The k smallest eigenpairs of every S_i; no neighbour can take their place.

    In float64 where torch may round its float32 products. Raises ValueError on the CPU for matrices
    that are not finite.
    """
    dtype = x.dtype
    if rounds_products(x.device):
        x, w = x.double(), w.double()
    groups = w.split(max(1, _NUMBERS_AT_ONCE // x.shape[1] ** 2), 1)
    parts = [_smallest(form(x, weights), k) for weights in groups]
    found = Solution(*(torch.cat(columns).to(dtype) for columns in zip(*parts, strict=True)))
    if x.device.type == "cpu":
        check_finite(name, found.values, torch.arange(w.shape[1]))
    return found


def _smallest(matrices: Tensor, k: int) -> Solution:
    values, vectors = symmetric_eigs(matrices, k)
    residuals = (bmm(vectors, matrices) - values[..., None] * vectors).norm(dim=2)
    # The lengths of the rows and the eigenvalues are no larger than |S|.
    norms = torch.maximum(matrices.norm(dim=2).amax(1), values.abs().amax(1))
    return Solution(
        values, vectors, torch.where(norms[:, None] == 0, 0, residuals / norms[:, None])
    )
