"""`splitting_hvp_conv2d` by Winograd's algorithm, against the oracle in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import reference

CHANNELS_LAST = torch.channels_last
# Of the largest value of the result.
ERROR = 1e-5


class Shape(NamedTuple):
    """A convolution with 3 x 3 filters; `size` is that of the output."""

    images: int
    channels: int
    size: tuple[int, int]
    neurons: int
    k: int = 1
    padding: tuple[int, int] = (1, 1)


SHAPES = [
    Shape(1, 1, (1, 1), 1),
    Shape(2, 3, (5, 6), 4),
    Shape(3, 17, (9, 7), 5, k=3),
    Shape(2, 16, (8, 8), 33, k=2, padding=(0, 0)),
    Shape(5, 20, (4, 13), 19, padding=(2, 0)),
    Shape(3, 8, (6, 6), 70, padding=(3, 2)),
    Shape(40, 32, (11, 10), 9),  # several parts
    Shape(9, 256, (8, 8), 130),  # the threads share every group of tiles
    Shape(4, 512, (4, 4), 240),  # more neurons than one pass takes
]


@pytest.fixture(autouse=True)
def winograd() -> Iterator[None]:
    gk.set_conv_algorithm("winograd")
    yield
    gk.set_conv_algorithm("auto")


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    height, width = (s + 2 - 2 * p for s, p in zip(shape.size, shape.padding, strict=True))
    x = draw(shape.images, shape.channels, max(height, 1), max(width, 1))
    out = (x.shape[2] + 2 * shape.padding[0] - 2, x.shape[3] + 2 * shape.padding[1] - 2)
    v = draw(shape.neurons, shape.k, shape.channels, 3, 3)
    return x, draw(shape.images, shape.neurons, *out), v if shape.k > 1 else v[:, 0]


def error(actual: Tensor, x: Tensor, w: Tensor, v: Tensor, padding: tuple[int, int]) -> float:
    expected = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), padding=padding)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape: Shape, format: torch.memory_format) -> None:
    x, w, v = make(shape)
    x, w = x.contiguous(memory_format=format), w.contiguous(memory_format=format)
    y = gk.splitting_hvp_conv2d(x, w, v, padding=shape.padding)
    assert y.shape == v.shape
    assert y.is_contiguous()
    assert error(y, x, w, v, shape.padding) <= ERROR


def test_images_that_are_copied_in_several_chunks() -> None:
    shape = Shape(20, 128, (32, 32), 128)
    x, w, v = make(shape)
    y = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    images, output = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, w))
    for result in (y, gk.splitting_hvp_conv2d(images, output, v, padding=1)):
        assert error(result, x, w, v, (1, 1)) <= ERROR


def test_slices_of_channels_are_read_in_place() -> None:
    x, w, v = make(Shape(4, 24, (8, 8), 12))
    images = x.contiguous(memory_format=CHANNELS_LAST)
    output = w.contiguous(memory_format=CHANNELS_LAST)
    y = gk.splitting_hvp_conv2d(images[:, 3:19], output[:, 2:11], v[2:11, 3:19], padding=1)
    assert error(y, x[:, 3:19], w[:, 2:11], v[2:11, 3:19], (1, 1)) <= ERROR


def test_large_layers_take_it_unasked_and_float64_never() -> None:
    x, w, v = make(Shape(8, 16, (16, 16), 16))
    asked = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    a, b, c = x.double(), w.double(), v.double()
    double = gk.splitting_hvp_conv2d(a, b, c, padding=1)
    gk.set_conv_algorithm("auto")
    assert torch.equal(asked, gk.splitting_hvp_conv2d(x, w, v, padding=1))
    gk.set_conv_algorithm("direct")
    assert not torch.equal(asked, gk.splitting_hvp_conv2d(x, w, v, padding=1))
    assert torch.equal(double, gk.splitting_hvp_conv2d(a, b, c, padding=1))


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[7]], ids=str)
def test_same_bits_whatever_the_threads(shape: Shape) -> None:
    x, w, v = make(shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            results.append(gk.splitting_hvp_conv2d(x, w, v, padding=shape.padding))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


def test_a_bad_neuron_stays_alone() -> None:
    shape = Shape(3, 16, (9, 9), 20, k=2)
    x, w, v = make(shape)
    clean = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    w[1, 7, 3, 2] = torch.nan
    v[11, 1, 0, 1, 1] = torch.inf
    y = gk.splitting_hvp_conv2d(x, w, v, padding=1)
    bad = torch.zeros(20, 2, dtype=torch.bool)
    bad[7], bad[11, 1] = True, True
    assert torch.equal(~y.isfinite().flatten(2).all(2), bad)
    assert torch.equal(y[~bad], clean[~bad])
