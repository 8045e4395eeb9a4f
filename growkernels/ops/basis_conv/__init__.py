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

from torch import Tensor

from growkernels.ops.basis_conv import reference

__all__ = ["basis_conv2d"]


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
        x: [N, Cin, H, W]; float32, float64, bfloat16 or float16. Contiguous and channels_last
            images are read in place.
        basis: [R, Cin, kh, kw], the filters that are trained freely, 1 <= R <= Cout.
        coeff: [Cout - R, R], or [Cout, R] with `include_basis=False`.
        bias: [Cout], added to y, or None.
        stride, padding, dilation: as in torch.nn.functional.conv2d, an int or a pair of ints.
        include_basis: whether the basis filters' own outputs are the first R channels of y.

    Returns:
        y, [N, Cout, Ho, Wo], in the memory format that torch's own convolution of x with the basis
        would return: channels_last for channels_last images.

    Differentiable in x, basis, coeff and bias, twice. Raises ValueError for shapes, strides and
    devices that do not fit, TypeError for dtypes. NaN and inf propagate.
    """
    return reference.basis_conv2d(x, basis, coeff, bias, stride, padding, dilation, include_basis)
