"""Kernels of convolutions with a basis, with all their tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from growkernels.ops.basis_conv.triton_kernels import (
    SUM_ELEMENTS,
    SUM_PROGRAMS,
    add_sums_kernel,
    coefficient_backward_kernel,
    convolve_kernel,
    convolve_rows_kernel,
    mix_kernel,
)
from growkernels.ops.basis_conv.triton_tiles import BACKWARD_TILES, FORWARD_TILES, ROW_TILES
from triton_builds import TritonBuild

_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def builds() -> Iterator[TritonBuild]:
    """Every kernel with every listed tile, as ResNet's layers launch it."""
    sizes = ("positions", "height", "width", "channels", "x_pixel", "filters", "combinations")
    form: dict[str, Any] = {
        "out_height": "i32:16", "out_width": "i32:16", "kernel_height": "i32",
        "kernel_width": "i32",
    }  # fmt: skip
    ones = dict.fromkeys(
        ("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"), 1
    )
    for dtype in (torch.bfloat16, torch.float32):
        pointer = f"*{_TYPES[dtype]}:16"
        for tile in FORWARD_TILES[dtype.itemsize] + ROW_TILES.get(dtype.itemsize, ()):
            shape = {
                "KEEP_MAPS": True, "POSITIONS": tile.positions, "FILTERS": tile.filters,
                "COMBINATIONS": tile.combinations,
            }  # fmt: skip
            label = f"{_TYPES[dtype]} {tile.positions}x{tile.filters}"
            convolution = {"bias": None, "z": None, **shape, "DEPTH": tile.depth(dtype)}
            pointers = dict.fromkeys(("x", "basis", "coeff", "y"), pointer)
            if tile.whole_rows:
                yield TritonBuild(
                    f"convolve_rows {label}", convolve_rows_kernel,
                    pointers | dict.fromkeys((*sizes, "out_height"), "i32:16")
                    | {"kernel_height": "i32"},
                    {**convolution, "padding_h": 1, "dilation_h": 1}, tile.warps, tile.stages,
                )  # fmt: skip
                continue
            yield TritonBuild(
                f"convolve {label}", convolve_kernel,
                pointers | dict.fromkeys(sizes, "i32:16") | form, {**convolution, **ones},
                tile.warps, tile.stages,
            )  # fmt: skip
            yield TritonBuild(
                f"mix {label}", mix_kernel,
                dict.fromkeys(("maps", "coeff", "y"), pointer)
                | dict.fromkeys(("positions", "maps_row", "filters", "combinations"), "i32:16"),
                {"bias": None, **shape}, tile.warps, 2,
            )  # fmt: skip
        for back in BACKWARD_TILES[dtype.itemsize]:
            yield TritonBuild(
                f"coefficient_backward {_TYPES[dtype]} {back.filters}x{back.combinations}",
                coefficient_backward_kernel,
                dict.fromkeys(("grad", "maps", "coeff", "dmaps"), pointer)
                | {"sums": "*fp32:16"}
                | dict.fromkeys(
                    ("positions", "grad_row", "maps_row", "filters", "combinations"), "i32:16"
                ),
                {
                    "maps_bias": None, "KEEP_MAPS": True, "DMAPS": True, "DCOEFF": True,
                    "DBIAS": False, "POSITIONS": back.positions, "FILTERS": back.filters,
                    "COMBINATIONS": back.combinations,
                },
                back.warps, back.stages,
            )  # fmt: skip
    yield TritonBuild(
        "add_sums bf16", add_sums_kernel,
        {"sums": "*fp32:16", "dcoeff": "*bf16:16"}
        | dict.fromkeys(("programs", "products"), "i32:16"),
        {"dbias": None, "channels": 0, "ELEMENTS": SUM_ELEMENTS, "PROGRAMS": SUM_PROGRAMS}, 4, 3,
    )  # fmt: skip
