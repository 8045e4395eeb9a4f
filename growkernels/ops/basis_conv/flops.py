"""FLOP formulas for torch.utils.flop_counter: the two convolutions, two FLOPs per multiply-add."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula


def count(maps: Sequence[int], basis: Sequence[int], coeff: Sequence[int]) -> tuple[int, int]:
    """FLOPs of the convolution with the basis and of the mix, for maps z of this shape."""
    positions = maps[0] * maps[2] * maps[3]
    return 2 * positions * prod(basis), 2 * positions * prod(coeff)


def register() -> None:
    ops = torch.ops.growkernels

    def forward(
        x: Sequence[int],
        basis: Sequence[int],
        coeff: Sequence[int],
        *args: object,
        out_shape: Sequence[int],
        **kwargs: object,
    ) -> int:
        return sum(count(out_shape, basis, coeff))

    def with_maps(
        x: Sequence[int],
        basis: Sequence[int],
        coeff: Sequence[int],
        *args: object,
        out_shape: Sequence[Sequence[int]],
        **kwargs: object,
    ) -> int:
        return sum(count(out_shape[0], basis, coeff))

    def backward(
        grad: Sequence[int],
        x: Sequence[int],
        basis: Sequence[int],
        coeff: Sequence[int],
        z: Sequence[int],
        z_bias: object,
        stride: object,
        padding: object,
        dilation: object,
        include_basis: bool,
        output_mask: Sequence[bool],
        **kwargs: object,
    ) -> int:
        convolution, mixing = count(z, basis, coeff)
        dx, dbasis, dcoeff, _ = output_mask
        return (dx + dbasis) * convolution + ((dx or dbasis) + dcoeff) * mixing

    register_flop_formula(ops.basis_conv2d)(forward)
    register_flop_formula(ops.basis_conv2d_with_maps)(with_maps)
    register_flop_formula(ops.basis_conv2d_backward)(backward)
