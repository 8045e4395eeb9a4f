"""Convolutions whose filters are few trained ones and linear combinations of them.

Of Cout filters only R, the basis, are trained freely; the others are mixed out of them by a matrix
of trained coefficients. With z = conv2d(x, basis), [N, R, Ho, Wo], and A the coefficients:

    include_basis    coeff           y
    True             [Cout - R, R]   cat(z, A z) over the channels
    False            [Cout, R]       A z

Source: Alekseev et al., "Layer-Specific Optimization: Sensitivity Based Convolution Layers Basis
Search" (2024); the form without the basis in the output is the low-rank (channel) factorisation of
a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growkernels.ops.arguments import check_optional_tensors, check_tensors, pair
from growkernels.ops.basis_conv import flops, gpu, vmap

__all__ = ["basis_conv2d"]

_ops = torch.ops.growkernels
_basis_conv2d = _ops.basis_conv2d.default
flops.register()
vmap.register()
gpu.register()


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
    """Convolution with R basis filters, and the mix of their outputs into the other channels.

    Args:
        x: [N, Cin, H, W]; float32, float64, bfloat16 or float16. N may be 0. Contiguous and
            channels_last images are read in place.
        basis: [R, Cin, kh, kw], the filters that are trained freely, 1 <= R <= Cout.
        coeff: [Cout - R, R], or [Cout, R] with `include_basis=False`.
        bias: [Cout], added to y, or None.
        stride, padding, dilation: as in torch.nn.functional.conv2d, an int or a pair of ints.
        include_basis: whether the basis filters' own outputs are the first R channels of y.

    Returns:
        y, [N, Cout, Ho, Wo], channels_last where x or the basis is (as torch's own convolution
        returns it), else contiguous.

    Differentiable in x, basis, coeff and bias, to any order, also under torch.func and in forward
    mode. For the backward pass it keeps x, the parameters, and of y, or of z where y does not
    contain it, no copy; where y was overwritten in place meanwhile, z is computed again.

    Sums of 16-bit products are kept in float32. See `set_conv_algorithm` for the algorithm and its
    error. NaN and inf propagate; Winograd may spread them to the outputs of the same tile.

    Raises ValueError for shapes, parameters and devices that do not fit (groups are not supported),
    TypeError for dtypes.
    """
    check_tensors("basis_conv2d", x=x, basis=basis, coeff=coeff)
    check_optional_tensors("basis_conv2d", bias=bias)
    y: Tensor = _basis_conv2d(
        x,
        basis,
        coeff,
        bias,
        pair("basis_conv2d: stride", stride),
        pair("basis_conv2d: padding", padding),
        pair("basis_conv2d: dilation", dilation),
        include_basis,
    )
    return y
