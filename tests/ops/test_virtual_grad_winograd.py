"""Convolution positions by Winograd's algorithm; test_contract_numbers.py has the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_samples.numbers import largest, threads
from op_samples.virtual_grad import WINOGRAD
from torch import Tensor

import growkernels as gk
from growkernels.ops.virtual_grad import reference

CHANNELS_LAST = torch.channels_last
# Of the largest value of the gradient.
ERROR = 1e-5


@pytest.fixture(autouse=True)
def winograd() -> Iterator[None]:
    gk.set_conv_algorithm("winograd")
    yield
    gk.set_conv_algorithm("auto")


def make(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, g = (torch.randn(shape, generator=generator) for _ in range(2))
    return h, g


def oracle(h: Tensor, g: Tensor) -> Tensor:
    return reference.virtual_grads([h.double()], [g.double()], "conv2d_relu")[0]


def test_sums_over_batches_and_second_moments() -> None:
    shapes = [(4, 16, 8, 8), (2, 24, 5, 9)]
    batches = [[make(shape) for shape in shapes] for _ in range(2)]
    batches[1] = [(g, h) for h, g in batches[1]]
    sums = [torch.zeros(shape[1], shape[1], 3, 3) for shape in shapes]
    moments = torch.zeros(len(shapes))
    for batch in batches:
        hs, gs = zip(*batch, strict=True)
        norms = gk.virtual_grad_norms(hs, gs, "conv2d_relu", sums, second_moments=moments)
    for position, (first, second) in enumerate(zip(*batches, strict=True)):
        expected = [oracle(*first), oracle(*second)]
        assert largest(sums[position], expected[0] + expected[1]) <= ERROR
        squares = [gradient.square().sum().item() for gradient in expected]
        assert moments[position].item() == pytest.approx(sum(squares), rel=ERROR)
        total = (expected[0] + expected[1]).square().sum().item()
        assert norms[position].item() == pytest.approx(total, rel=ERROR)


def test_slices_of_channels_are_read_in_place() -> None:
    h, g = make((4, 24, 8, 8))
    expected = oracle(h[:, 3:19], g[:, 5:21])
    h, g = h.contiguous(memory_format=CHANNELS_LAST), g.contiguous(memory_format=CHANNELS_LAST)
    gradient = gk.virtual_grads([h[:, 3:19]], [g[:, 5:21]], "conv2d_relu")[0]
    assert largest(gradient, expected) <= ERROR


def test_what_the_mask_hides_may_be_anything() -> None:
    h, g = make((3, 16, 9, 9))
    clean = gk.virtual_grads([h], [g], "conv2d_relu")[0]
    g = torch.where(h > 0, g, torch.nan)
    assert torch.equal(gk.virtual_grads([h], [g], "conv2d_relu")[0], clean)


def test_large_positions_take_it_unasked_and_float64_never() -> None:
    h, g = make((8, 16, 16, 16))
    asked = gk.virtual_grads([h], [g], "conv2d_relu")[0]
    double = gk.virtual_grads([h.double()], [g.double()], "conv2d_relu")[0]
    gk.set_conv_algorithm("auto")
    assert torch.equal(asked, gk.virtual_grads([h], [g], "conv2d_relu")[0])
    gk.set_conv_algorithm("direct")
    assert not torch.equal(asked, gk.virtual_grads([h], [g], "conv2d_relu")[0])
    assert torch.equal(double, gk.virtual_grads([h.double()], [g.double()], "conv2d_relu")[0])


@pytest.mark.parametrize("shape", WINOGRAD[-2:], ids=str)
def test_same_bits_whatever_the_threads(shape: tuple[int, ...]) -> None:
    h, g = make(shape)
    results = []
    for count in (1, 1, 2, 5):
        with threads(count):
            results.append(gk.virtual_grads([h], [g], "conv2d_relu")[0])
    assert all(torch.equal(results[0], result) for result in results)
