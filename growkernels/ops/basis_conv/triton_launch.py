"""Launches the family's Triton kernels; `gpu.py` alone imports it, when it needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from growkernels.ops.basis_conv.triton_kernels import (
    SUM_ELEMENTS,
    SUM_PROGRAMS,
    add_sums_kernel,
    coefficient_backward_kernel,
    convolve_kernel,
    convolve_rows_kernel,
    mix_kernel,
)
from growkernels.ops.basis_conv.triton_tiles import BackwardTile, ForwardTile


def as_rows(images: Tensor) -> Tensor:
    """[N * H * W, C] with adjacent channels, a view where the layout allows it."""
    rows = images.permute(0, 2, 3, 1).flatten(0, 2)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def convolve(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    y: Tensor,
    z: Tensor | None,
    tile: ForwardTile,
) -> None:
    """Writes y, and z where it is given, both channels_last and not empty.

    y has R + Cout channels where coeff has Cout rows, or Cout where the maps are not a part of y.
    """
    filters, channels, *kernel = basis.shape
    combinations = len(coeff)
    positions = y.numel() // y.shape[1]
    grid = (triton.cdiv(positions, tile.positions),)
    rows = as_rows(x)
    tensors = rows, basis.permute(0, 2, 3, 1).contiguous(), coeff.contiguous(), _dense(bias), y, z
    sizes = positions, *x.shape[2:], channels, rows.stride(0), filters, combinations
    constants: dict[str, Any] = {
        "KEEP_MAPS": y.shape[1] > combinations, "POSITIONS": tile.positions,
        "FILTERS": tile.filters, "DEPTH": tile.depth(x.dtype), "COMBINATIONS": tile.combinations,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tile.whole_rows:
        convolve_rows_kernel[grid](
            *tensors, *sizes, y.shape[2], kernel[0], padding[0], dilation[0], **constants
        )
    else:
        convolve_kernel[grid](
            *tensors, *sizes, *y.shape[2:], *kernel, *stride, *padding, *dilation, **constants
        )


def mix(
    maps: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tile: ForwardTile,
) -> None:
    """Writes y, channels_last and not empty, out of the maps; its channels as in `convolve`."""
    filters, combinations = maps.shape[1], len(coeff)
    positions = y.numel() // y.shape[1]
    rows = as_rows(maps)
    mix_kernel[(triton.cdiv(positions, tile.positions),)](
        rows, coeff.contiguous(), _dense(bias), y, positions, rows.stride(0), filters, combinations,
        KEEP_MAPS=y.shape[1] > combinations, POSITIONS=tile.positions, FILTERS=tile.filters,
        COMBINATIONS=tile.combinations, num_warps=tile.warps, num_stages=2,
    )  # fmt: skip


def coefficient_backward(
    grad: Tensor,
    maps: Tensor,
    maps_bias: Tensor | None,
    coeff: Tensor,
    dmaps: Tensor | None,
    dcoeff: Tensor | None,
    dbias: Tensor | None,
    multiprocessors: int,
    tile: BackwardTile,
) -> None:
    """Writes the gradients that are given, of z (channels_last), coeff and bias, for that of y.

    `maps` contains `maps_bias` where that is given. No argument is empty.
    """
    combinations, filters = coeff.shape
    grad_rows, maps_rows = as_rows(grad), as_rows(maps)
    positions = len(grad_rows)
    programs = min(
        triton.cdiv(positions, tile.positions), multiprocessors * tile.programs_per_multiprocessor
    )
    products = 0 if dcoeff is None else dcoeff.numel()
    channels = 0 if dbias is None else dbias.numel()
    sums = grad.new_empty(programs, products + channels, dtype=torch.float32)
    coefficient_backward_kernel[(programs,)](
        grad_rows, maps_rows, _dense(maps_bias), coeff.contiguous(), dmaps, sums,
        positions, grad_rows.stride(0), maps_rows.stride(0), filters, combinations,
        KEEP_MAPS=grad.shape[1] > combinations, DMAPS=dmaps is not None,
        DCOEFF=dcoeff is not None, DBIAS=dbias is not None,
        POSITIONS=tile.positions, FILTERS=tile.filters, COMBINATIONS=tile.combinations,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if products + channels:
        add_sums_kernel[(triton.cdiv(products + channels, SUM_ELEMENTS),)](
            sums, dcoeff, dbias, programs, products, channels,
            ELEMENTS=SUM_ELEMENTS, PROGRAMS=SUM_PROGRAMS, num_warps=4,
        )  # fmt: skip


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
