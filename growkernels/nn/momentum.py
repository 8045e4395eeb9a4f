"""Momentum of a kernel in terms of its factors, and back.

The kernel matrix is W = [B; A B] or W = A B (see kernel_factors). A momentum buffer of SGD is a
sum of gradients with fixed weights, and a gradient with respect to (B, A) is J^T G, where G is that
with respect to W and J the derivative of W with respect to (B, A). So both directions are linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values of the factors below this share of the largest are not divided by.
RTOL = 1e-3


def to_factors(
    momentum: Tensor, basis: Tensor, coeff: Tensor, include_basis: bool
) -> tuple[Tensor, Tensor]:
    """J^T M: what the buffers of B and A would hold, had the same G reached them at this (B, A).

    `momentum` M is [Cout, K]; returns the buffers of B [R, K] and of A.
    """
    if not include_basis:
        return coeff.T @ momentum, momentum @ basis.T
    top, rest = momentum[: len(basis)], momentum[len(basis) :]
    return top + coeff.T @ rest, rest @ basis.T


def to_kernel(
    of_basis: Tensor, of_coeff: Tensor, basis: Tensor, coeff: Tensor, include_basis: bool
) -> Tensor:
    """The smallest M [Cout, K] with J^T M = (of_basis, of_coeff), so `to_factors` undoes it.

    What the factors could not see, the directions outside the range of J, stays zero. For W = A B
    the two equations can contradict each other once A and B have moved while the buffers filled;
    then the one for B holds.
    """
    inverse = torch.linalg.pinv(basis, rtol=RTOL)  # [K, R]
    if not include_basis:
        lift = torch.linalg.pinv(coeff, rtol=RTOL)  # [R, Cout]
        seen_by_coeff = of_coeff @ inverse.T
        kernel: Tensor = lift.T @ of_basis + seen_by_coeff - coeff @ (lift @ seen_by_coeff)
        return kernel
    # Within the rows of B, J^T M = m fixes both parts of M; outside them only top + A^T rest is
    # fixed, and rest = A top makes M the smallest.
    inside = of_basis @ inverse @ basis
    rest = of_coeff @ inverse.T
    top = inside - coeff.T @ rest
    gram = torch.eye(len(basis), dtype=basis.dtype, device=basis.device) + coeff.T @ coeff
    outside = torch.linalg.solve(gram, of_basis - inside)
    return torch.cat([top + outside, rest + coeff @ outside])
