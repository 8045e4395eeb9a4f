"""Products and modes in which eigenvectors stay orthonormal, whatever torch is set to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Its 16-bit products would be neither orthonormal nor within tol."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def rounds_products(device: torch.device) -> bool:
    """Whether torch is set to round the factors of float32 products there."""
    # torch's stubs know of neither.
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return backend.matmul.fp32_precision not in ("none", "ieee")


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm`; in float64 where torch would round float32."""
    if a.dtype == torch.float32 and rounds_products(a.device):
        return torch.bmm(a.double(), b.double()).float()
    return torch.bmm(a, b)
