"""What docs/accuracy.md says of the Winograd kernels' rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import growkernels as gk


@pytest.fixture(autouse=True)
def winograd() -> Iterator[None]:
    before = gk.conv_algorithm()
    gk.set_conv_algorithm("winograd")
    yield
    gk.set_conv_algorithm(before)


def convolve(x: Tensor, basis: Tensor, padding: int) -> Tensor:
    """The maps alone: nothing is mixed."""
    return gk.basis_conv2d(x, basis, basis.new_empty(0, len(basis)), padding=padding)


@pytest.mark.parametrize("channels", [256, 4096])
def test_many_channels_cost_no_more_digits_than_torch_loses(channels: int) -> None:
    x = torch.randn(2, channels, 8, 8).to(memory_format=torch.channels_last)
    basis = torch.randn(16, channels, 3, 3)
    exact = F.conv2d(x.double(), basis.double(), padding=1)
    ours = (convolve(x, basis, 1) - exact).abs().max()
    torchs = (F.conv2d(x, basis, padding=1) - exact).abs().max()
    # One sum over 4096 channels errs some eight times as much as torch does.
    assert ours <= 2 * torchs


def ramp() -> tuple[Tensor, Tensor]:
    """Second differences of it are a thousandth of what they are sums of."""
    x = 100 * torch.arange(16.0).expand(2, 16, 16, 16) + torch.randn(2, 16, 16, 16)
    basis = torch.zeros(8, 16, 3, 3)
    basis[:, :, 1] = torch.tensor([1.0, -2.0, 1.0])
    return x, basis


def one_large_pixel() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 16, 16, 16)
    x[:, :, 5, 5] = 1e6
    return x, torch.randn(8, 16, 3, 3)


@pytest.mark.parametrize("images", [ramp, one_large_pixel])
def test_the_error_is_small_beside_the_sums_of_absolute_values(
    images: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    x, basis = images()
    error = (convolve(x, basis, 0) - F.conv2d(x.double(), basis.double())).abs().max()
    largest = F.conv2d(x.double().abs(), basis.double().abs()).max()
    assert error <= 1e-5 * largest
