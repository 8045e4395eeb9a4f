"""Which algorithm computes convolutions on the CPU."""

from __future__ import annotations

import torch

__all__ = ["conv_algorithm", "set_conv_algorithm"]

_ops = torch.ops.growkernels


def set_conv_algorithm(algorithm: str) -> None:
    """Chooses how the ops compute their convolutions on the CPU, for the whole process.

    The ops are `basis_conv2d`, `splitting_hvp_conv2d`, and `virtual_grad_norms` and `virtual_grads`
    at convolution positions.

    "auto" takes the fastest by shape and dtype. "direct" sums products as the definition says, with
    at most twice the rounding error of torch's own convolution. "winograd" takes the transforms of
    Lavin and Gray ("Fast Algorithms for Convolutional Neural Networks", 2016) wherever there are
    any: for 3 x 3 kernels with stride 1 and dilation 1 in float32. Everything else, float64 and the
    16-bit types always, is computed directly. Winograd's error stays below 1e-5 of what the
    largest value of the result would be if nothing cancelled; docs/accuracy.md compares it with
    torch's.

    The environment variable GROWKERNELS_CONV_ALGORITHM sets the initial value, "auto" without it.
    Raises ValueError for other names.
    """
    _ops.set_conv_algorithm(algorithm)


def conv_algorithm() -> str:
    """The algorithm asked for: "auto", "direct" or "winograd" (see `set_conv_algorithm`)."""
    name: str = _ops.conv_algorithm()
    return name
