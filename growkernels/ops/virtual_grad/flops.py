"""FLOP formulas for torch.utils.flop_counter: two per multiply-add, masks not counted."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula


def count(
    input_shapes: Sequence[Sequence[int]], grad_shapes: Sequence[Sequence[int]], layer: str
) -> int:
    """FLOPs of one call on positions of these shapes."""
    total = 0
    for shape, of_grad in zip(input_shapes, grad_shapes, strict=True):
        if layer == "conv2d_relu":
            samples, channels, height, width = shape
            total += 2 * samples * height * width * 9 * channels * channels
        else:
            total += 2 * prod(shape) * of_grad[-1]
    return total


def register() -> None:
    ops = torch.ops.growkernels

    def formula(
        input_shapes: Sequence[Sequence[int]],
        grad_shapes: Sequence[Sequence[int]],
        layer: str,
        *args: object,
        out_shape: object = None,
        **kwargs: object,
    ) -> int:
        return count(input_shapes, grad_shapes, layer)

    register_flop_formula(
        [ops.virtual_grads, ops.virtual_grad_norms, ops.accumulate_virtual_grads]
    )(formula)
