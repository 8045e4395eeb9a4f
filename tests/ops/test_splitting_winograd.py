"""`splitting_hvp_conv2d` by Winograd's algorithm; test_contract_numbers.py has the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_samples import Sample
from op_samples.numbers import largest, threads
from op_samples.splitting import WINOGRAD, convolution
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import reference

CHANNELS_LAST = torch.channels_last
# Of the largest value of the result.
ERROR = 1e-5


@pytest.fixture(autouse=True)
def winograd() -> Iterator[None]:
    gk.set_conv_algorithm("winograd")
    yield
    gk.set_conv_algorithm("auto")


def error(actual: Tensor, x: Tensor, w: Tensor, v: Tensor, padding: tuple[int, int]) -> float:
    expected = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), padding=padding)
    return largest(actual, expected)


def test_images_that_are_copied_in_several_chunks() -> None:
    x, w, v = convolution((20, 128, 32, 32), (128, 1, 3, 3), 1, 1).tensors(torch.float32)
    y = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    images, output = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, w))
    for result in (y, gk.splitting_hvp_conv2d(images, output, v, padding=1)):
        assert error(result, x, w, v, (1, 1)) <= ERROR


def test_slices_of_channels_are_read_in_place() -> None:
    x, w, v = convolution((4, 24, 8, 8), (12, 1, 3, 3), 1, 1).tensors(torch.float32)
    images = x.contiguous(memory_format=CHANNELS_LAST)
    output = w.contiguous(memory_format=CHANNELS_LAST)
    y = gk.splitting_hvp_conv2d(images[:, 3:19], output[:, 2:11], v[2:11, 3:19], padding=1)
    assert error(y, x[:, 3:19], w[:, 2:11], v[2:11, 3:19], (1, 1)) <= ERROR


def test_large_layers_take_it_unasked_and_float64_never() -> None:
    x, w, v = convolution((8, 16, 16, 16), (16, 1, 3, 3), 1, 1).tensors(torch.float32)
    asked = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    a, b, c = x.double(), w.double(), v.double()
    double = gk.splitting_hvp_conv2d(a, b, c, padding=1)
    gk.set_conv_algorithm("auto")
    assert torch.equal(asked, gk.splitting_hvp_conv2d(x, w, v, padding=1))
    gk.set_conv_algorithm("direct")
    assert not torch.equal(asked, gk.splitting_hvp_conv2d(x, w, v, padding=1))
    assert torch.equal(double, gk.splitting_hvp_conv2d(a, b, c, padding=1))


@pytest.mark.parametrize("sample", [WINOGRAD[3], WINOGRAD[7]], ids=str)
def test_same_bits_whatever_the_threads(sample: Sample) -> None:
    tensors = sample.tensors(torch.float32)
    results = []
    for count in (1, 1, 2, 5):
        with threads(count):
            results.append(gk.splitting_hvp_conv2d(*tensors, **sample.arguments))
    assert all(torch.equal(results[0], result) for result in results)


def test_a_bad_neuron_stays_alone() -> None:
    x, w, v = convolution((3, 16, 9, 9), (20, 2, 3, 3), 1, 1).tensors(torch.float32)
    clean = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    w[1, 7, 3, 2] = torch.nan
    v[11, 1, 0, 1, 1] = torch.inf
    y = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    bad = torch.zeros(20, 2, dtype=torch.bool)
    bad[7], bad[11, 1] = True, True
    assert torch.equal(~y.isfinite().flatten(2).all(2), bad)
    assert torch.equal(y[~bad], clean[~bad])
