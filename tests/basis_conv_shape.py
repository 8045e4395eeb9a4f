"""Sizes of calls of basis_conv2d, for the tests of its kernels on and without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Shape(NamedTuple):
    """Sizes of one call."""

    x: tuple[int, int, int, int]
    filters: int
    mixed: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def form(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation


# So many positions that an H100 mixes the maps in registers, where the basis is a part of y.
CHOSEN = [
    Shape((64, 64, 16, 16), 32, 32),
    Shape((40, 48, 17, 19), 62, 70),
    Shape((96, 32, 18, 16), 16, 48, stride=(2, 2)),
    Shape((64, 80, 16, 16), 28, 37, (1, 1), padding=(0, 0)),
]
BEYOND_32_BITS = Shape((132, 32, 512, 512), 28, 36, (1, 1), padding=(0, 0))
