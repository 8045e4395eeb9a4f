"""The oracle: a basis convolution in plain differentiable torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def basis_conv2d(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    include_basis: bool = True,
) -> Tensor:
    """The definition, in the dtype of the arguments (see `growkernels.basis_conv2d`)."""
    maps = F.conv2d(x, basis, None, stride, padding, dilation)
    mixed = torch.einsum("or,nrhw->nohw", coeff, maps)
    y = torch.cat([maps, mixed], dim=1) if include_basis else mixed
    return y if bias is None else y + bias[:, None, None]
