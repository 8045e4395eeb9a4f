"""What the tests of `symmetric_eigs` share, on every device and for every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric(n: int, m: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random symmetric matrices [n, m, m]; the same on every device."""
    a = torch.randn(n, m, m, dtype=torch.float64)
    return (a + a.mT).to(device, dtype)


def check_eigenpairs(a: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """Against LAPACK in float64, up to the rounding of the results' dtype."""
    values, rows = (part.double().cpu() for part in found)
    exact = a.double().cpu()
    m = a.shape[1]
    scale = exact.abs().amax((1, 2), keepdim=True).clamp_min(1e-300) * m
    error = 8 * torch.finfo(a.dtype).eps
    assert (values.diff(dim=1) >= 0).all()
    expected = torch.linalg.eigvalsh(exact)
    assert ((values - expected).abs() <= error * scale[..., 0]).all()
    assert ((rows @ exact - values[..., None] * rows).abs() <= error * scale).all()
    assert (rows @ rows.mT - torch.eye(m, dtype=torch.float64)).abs().max() <= error * m
