"""Momentum of factors lifts to the kernel as the pseudo-inverse of the chain rule says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from growkernels.nn.kernel_factors import kernel_matrix
from growkernels.nn.momentum import to_factors, to_kernel


@pytest.mark.parametrize("include_basis", [True, False])
def test_the_lifted_momentum_is_the_smallest(include_basis: bool) -> None:
    """Against the pseudo-inverse of the explicit Jacobian of the kernel."""
    basis = torch.randn(3, 7, dtype=torch.float64)
    coeff = torch.randn(2 if include_basis else 5, 3, dtype=torch.float64)

    def kernel(b: Tensor, a: Tensor) -> Tensor:
        return kernel_matrix(b, a, include_basis).flatten()

    parts = torch.autograd.functional.jacobian(kernel, (basis, coeff))
    jacobian = torch.cat([part.flatten(1) for part in parts], 1)
    momentum = torch.randn(5, 7, dtype=torch.float64)
    seen = to_factors(momentum, basis, coeff, include_basis)
    expected = jacobian.T @ momentum.flatten()
    torch.testing.assert_close(torch.cat([m.flatten() for m in seen]), expected)
    lifted = to_kernel(*seen, basis, coeff, include_basis)
    smallest = torch.linalg.pinv(jacobian.T) @ expected
    torch.testing.assert_close(lifted.flatten(), smallest, rtol=1e-9, atol=1e-10)
