"""Squared norms of a layer's gradient, by which candidate positions are compared.

The choices are those of SensLI (arXiv 2311.15995, the comparison of norms for convolutions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMS = ("frobenius", "frobenius_scaled", "operator")


def squared_norm(gradient: Tensor, norm: str, feature_map: tuple[int, int] | None = None) -> Tensor:
    """The squared norm of one gradient, a scalar tensor on the gradient's device.

    Args:
        gradient: [out, in] of a linear layer or [out, in, kh, kw] of a convolution, float32 or
            float64. NaN or inf anywhere, or an overflow of the square, gives NaN.
        norm: ``"frobenius"``; ``"frobenius_scaled"``: divided by the number of entries;
            ``"operator"``: the largest singular value of the matrix, or of the convolution.
        feature_map: (H, W) that the convolution acts on; needed for its operator norm alone.

    Raises:
        ValueError: unknown norm, or a convolution's operator norm without feature_map.
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown norm {norm!r}; choose one of {', '.join(NORMS)}.")
    # One pass over the gradient: its own norm says whether every entry is finite.
    frobenius: Tensor = torch.linalg.vector_norm(gradient).square()
    if not frobenius.isfinite():
        return gradient.new_tensor(math.nan)
    if norm == "operator" and gradient.dim() == 2:
        largest: Tensor = torch.linalg.svdvals(gradient)[0]
        return largest.square()
    if norm == "operator":
        if feature_map is None:
            raise ValueError("A convolution's operator norm needs feature_map=(height, width).")
        return conv2d_operator_norm(gradient, feature_map).square()
    return frobenius / gradient.numel() if norm == "frobenius_scaled" else frobenius


def conv2d_operator_norm(kernel: Tensor, feature_map: tuple[int, int]) -> Tensor:
    """Largest singular value of the stride-1 *circular* convolution with this kernel.

    Assumption: the feature map wraps around at its borders (circular padding), where networks
    pad with zeros; then the Fourier transform splits the operator into one [out, in] matrix per
    frequency, and its singular values are all of theirs together (Sedghi, Gupta and Long, "The
    Singular Values of Convolutional Layers", ICLR 2019). The transform runs over the two *tap*
    axes, zero-padded to the feature map; taps beyond a map smaller than the kernel wrap around.

    Args:
        kernel: [out, in, kh, kw], float32 or float64, finite.
        feature_map: (H, W), the size of the input the convolution acts on.

    Returns:
        A scalar tensor of the kernel's dtype.
    """
    height, width = feature_map
    # A real kernel has conjugate matrices at opposite frequencies: half of one axis is enough.
    rows = _fourier_matrix(height, kernel.shape[2], height, kernel)
    columns = _fourier_matrix(width, kernel.shape[3], width // 2 + 1, kernel)
    spectrum = torch.einsum("oiab,fa,gb->fgoi", kernel.to(rows.dtype), rows, columns).flatten(0, 1)

    # sigma_1 <= Frobenius norm: going through the frequencies from the largest Frobenius norm
    # down, the search is over once the norms left are below the largest sigma_1 found. Gradients
    # are dominated by few frequencies, so few of the decompositions are made.
    bounds, order = torch.linalg.matrix_norm(spectrum).sort(descending=True)
    largest: Tensor = bounds.new_zeros(())
    chunk = 8
    for start in range(0, len(order), chunk):
        if bounds[start] <= largest:
            break
        matrices = spectrum[order[start : start + chunk]]
        # The largest eigenvalue of A^H A is as accurate as sigma_1 squared, and much cheaper.
        squared: Tensor = torch.linalg.eigvalsh(matrices.mH @ matrices)[:, -1].max()
        largest = torch.maximum(largest, squared.clamp(min=0).sqrt())
    return largest


def _fourier_matrix(size: int, taps: int, frequencies: int, like: Tensor) -> Tensor:
    """exp(-2 pi i f a / size) for f < frequencies and a < taps, complex, on like's device."""
    f = torch.arange(frequencies, device=like.device, dtype=like.dtype)
    a = torch.arange(taps, device=like.device, dtype=like.dtype)
    angle = torch.outer(f, a) * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)
