"""The rows whose products GradMax and TINY sum up, of linear layers and of convolutions alike.

A *place* is where a new neuron would have an output: a row of a linear layer, a pixel of an image
of a convolution. A *tap* is one entry of the reader's kernel (a linear layer has one): at its
outputs q it reads the places p(q, tap), or nothing where these are in the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growkernels.growth.neuron_scaling.neuron_rows import Layer


def patches(layer: Layer, x: Tensor) -> Tensor:
    """What each place of a layer's outputs is computed from: x [N, C, H, W] of a convolution
    becomes [N, H', W', d], in the order of its weight's entries; rows of a linear layer [..., d]
    become [M, d].
    """
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    x = x if x.dim() == 4 else x[None]
    kernel, stride, padding, dilation = sizes(layer)
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    columns = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
    places: Tensor = columns.unflatten(1, (height, width))
    return places


def outputs(layer: Layer, y: Tensor) -> Tensor:
    """A layer's outputs (or their gradients) as rows [M, D]."""
    if not isinstance(layer, nn.Conv2d):
        return y.flatten(0, -2)
    return (y if y.dim() == 4 else y[None]).movedim(1, -1).flatten(0, -2)


def read_by_taps(reader: Layer, places: Tensor) -> Iterator[Tensor]:
    """For each tap of a reader what its outputs read by it, [M, d]; ``places`` as from patches."""
    if not isinstance(reader, nn.Conv2d):
        yield places
        return
    kernel, stride, padding, dilation = sizes(reader)
    padded = F.pad(places, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    height, width = (
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[1:3], kernel, stride, dilation, strict=True)
    )
    for row in range(0, kernel[0] * dilation[0], dilation[0]):
        for column in range(0, kernel[1] * dilation[1], dilation[1]):
            rows = padded[:, row : row + stride[0] * height : stride[0]]
            taken = rows[:, :height, column : column + stride[1] * width : stride[1]]
            yield taken[:, :, :width].flatten(0, -2)


def sizes(layer: nn.Conv2d) -> list[tuple[int, int]]:
    """Kernel, stride, padding and dilation."""
    return [
        cast(tuple[int, int], size)
        for size in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    ]


def with_ones(rows: Tensor, ones: bool) -> Tensor:
    """Rows [..., d] with a last entry of 1, or as they are."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if ones else rows
