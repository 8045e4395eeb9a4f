"""Kernels for products with splitting matrices, with all their tiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from growkernels.ops.splitting.triton_kernels import (
    REDUCE_BLOCK,
    WEIGHT_BLOCK,
    combine_kernel,
    fused_kernel,
    patch_constants,
    project_kernel,
    reduce_kernel,
    weight_kernel,
)
from growkernels.ops.splitting.triton_tiles import COMBINE, FUSED, PROJECT, Patches, Tile
from triton_builds import TritonBuild


def builds() -> Iterator[TritonBuild]:
    """Every kernel with every tile; convolutions for 3 x 3 filters on 32 x 32 images."""
    for kind in ("16 bit", "tf32", "ieee"):
        for tile, architectures in _tiles(kind).items():
            constants = {"CHUNKS": tile.chunks, "PRECISION": kind if kind == "tf32" else "ieee"}
            dtypes = {"bf16": "bf16", "fp16": "fp16"} if kind == "16 bit" else {kind: "fp32"}
            for name, dtype in dtypes.items():
                yield _build(
                    f"fused {name}", fused_kernel, tile, dtype, architectures, None, constants
                )
            if kind == "16 bit":
                yield _build(
                    "fused bf16", fused_kernel, tile, "bf16", architectures,
                    _example_patches(tile.width), constants,
                )  # fmt: skip
    one = {"PARTS": 1}
    for architecture in PROJECT:
        pair = (
            ("project", project_kernel, PROJECT[architecture]),
            ("combine", combine_kernel, COMBINE[architecture]),
        )
        for name, kernel, tile in pair:
            for patches in (None, _example_patches(9 * 64)):
                yield _build(f"{name} bf16", kernel, tile, "bf16", (architecture,), patches, one)
            yield _build(f"{name} fp16", kernel, tile, "fp16", (architecture,), None, one)
        yield _build(
            "project two parts bf16", project_kernel, PROJECT[architecture], "bf16",
            (architecture,), None, {"PARTS": 2},
        )  # fmt: skip
    yield TritonBuild(
        "reduce", reduce_kernel,
        {"partial": "*fp32:16", "out": "*bf16:16", "splits": "i32", "size": "i32:16",
         "channels": "i32:16"},
        {"taps": 1, "BLOCK": REDUCE_BLOCK}, 4, 3,
    )  # fmt: skip
    for activation in ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus"):
        pointers = dict.fromkeys(("grad", "preact", "out"), "*bf16:16")
        yield TritonBuild(
            f"weight {activation}", weight_kernel, {**pointers, "size": "i32:16", "beta": "fp32"},
            {"ACTIVATION": activation, "BLOCK": WEIGHT_BLOCK}, 4, 3,
        )  # fmt: skip


def _tiles(kind: str) -> dict[Tile, tuple[int, ...]]:
    """The fused kernel's tiles, each with the architectures that list it."""
    lists = {architecture: FUSED[architecture, kind] for architecture in PROJECT}
    return {
        tile: tuple(sorted(which for which, listed in lists.items() if tile in listed))
        for tiles in lists.values()
        for tile in tiles
    }


def _example_patches(width: int) -> Patches:
    """Patches of at most `width` columns."""
    return Patches(width // 9 // 8 * 8, 32, 32, 3, 32, 32, 1, 1, 1, 1, 1, 1)


def _build(
    name: str, kernel: Any, tile: Tile, dtype: str, architectures: tuple[int, ...],
    patches: Patches | None,
    constants: Mapping[str, object],
) -> TritonBuild:  # fmt: skip
    values = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
        "STAGES": tile.stages, "PATCH": patch_constants(patches), "stride_wn": 1, **constants,
    }  # fmt: skip
    types = dict.fromkeys(("x", "w", "v", "p"), f"*{dtype}:16")
    types |= {"out": "*fp32:16", "rows": "i32", "first_row": "i32:16", "k": "i32"}
    types |= dict.fromkeys(
        ("neurons", "width", "x_width", "rows_per_split", "stride_x", "stride_wm"), "i32:16"
    )
    names = kernel.arg_names
    columns = f"{tile.chunks}x{tile.block_d}" if tile.chunks > 1 else str(tile.block_d)
    return TritonBuild(
        f"{name}{' patches' if patches else ''} {tile.block_m}x{tile.block_n}x{columns}",
        kernel,
        {argument: types[argument] for argument in names if argument in types},
        {argument: value for argument, value in values.items() if argument in names},
        tile.warps,
        tile.stages,
        architectures,
    )
