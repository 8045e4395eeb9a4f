"""FLOP formulas for torch.utils.flop_counter: two per multiply-add, masks not counted."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula


def count(input_shapes: Sequence[Sequence[int]], layer: str) -> int:
    """FLOPs of one call on positions of these shapes."""
    total = 0
    for shape in input_shapes:
        if layer == "conv2d_relu":
            samples, channels, height, width = shape
            total += 2 * samples * height * width * 9 * channels * channels
        else:
            total += 2 * prod(shape[:-1]) * shape[-1] ** 2
    return total


def register() -> None:
    ops = torch.ops.growkernels

    def formula(
        input_shapes: Sequence[Sequence[int]],
        grad_shapes: object,
        layer: str,
        *args: object,
        out_shape: object = None,
        **kwargs: object,
    ) -> int:
        return count(input_shapes, layer)

    register_flop_formula(
        [ops.virtual_grads, ops.virtual_grad_norms, ops.accumulate_virtual_grads]
    )(formula)
