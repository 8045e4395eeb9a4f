"""The norms, the convolution's against an explicitly built circular-convolution matrix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from growkernels.growth.layer_insertion.merit_norms import conv2d_operator_norm, squared_norm


def circular_convolution_matrix(kernel: Tensor, height: int, width: int) -> Tensor:
    """[out * H * W, in * H * W]: y[o, i, j] = sum K[o, c, a, b] x[c, i + a, j + b], wrapping."""
    out_channels, in_channels, kh, kw = kernel.shape
    matrix = torch.zeros(out_channels, height, width, in_channels, height, width).to(kernel)
    for i, j, a, b in itertools.product(range(height), range(width), range(kh), range(kw)):
        matrix[:, i, j, :, (i + a) % height, (j + b) % width] += kernel[:, :, a, b]
    return matrix.reshape(out_channels * height * width, -1)


@pytest.mark.parametrize("feature_map", [(5, 6), (4, 4), (3, 7), (2, 2), (1, 1), (8, 3)])
@pytest.mark.parametrize("channels", [(4, 4), (3, 6), (1, 1)])
def test_operator_norm_is_the_largest_singular_value(
    feature_map: tuple[int, int], channels: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(*channels, 3, 3, generator=generator, dtype=torch.float64)
    matrix = circular_convolution_matrix(kernel, *feature_map)
    expected = torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(conv2d_operator_norm(kernel, feature_map), expected)
    torch.testing.assert_close(squared_norm(kernel, "operator", feature_map), expected**2)


def test_operator_norm_reacts_to_every_channel() -> None:
    kernel = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = conv2d_operator_norm(kernel, (8, 8))
    for axis, channel in itertools.product((0, 1), range(8)):
        changed = kernel.clone()
        changed.select(axis, channel).mul_(100)
        assert conv2d_operator_norm(changed, (8, 8)) > 5 * plain


def test_many_frequencies_with_one_dominant() -> None:
    # A kernel whose largest singular value is at one frequency behind many of similar norm.
    kernel = torch.eye(6, dtype=torch.float64)[:, :, None, None] * torch.ones(3, 3).double()
    torch.testing.assert_close(
        conv2d_operator_norm(kernel, (32, 32)), torch.tensor(9.0, dtype=torch.float64)
    )


def test_frobenius_norms_and_nan() -> None:
    gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(squared_norm(gradient, "frobenius")) == 25
    assert float(squared_norm(gradient, "frobenius_scaled")) == 6.25
    assert float(squared_norm(gradient, "operator")) == pytest.approx(16)
    for norm in ("frobenius", "frobenius_scaled", "operator"):
        assert math.isnan(squared_norm(torch.tensor([[math.nan, 1.0]]), norm))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Unknown norm 'nuclear'"):
        squared_norm(torch.ones(2, 2), "nuclear")
    with pytest.raises(ValueError, match="needs feature_map"):
        squared_norm(torch.ones(2, 2, 3, 3), "operator")
