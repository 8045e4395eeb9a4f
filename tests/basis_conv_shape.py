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
