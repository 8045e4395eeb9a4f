"""How the products with splitting matrices run on a GPU: which kernels, which tiles, and why.

Nothing here touches a GPU or imports Triton, so that the choice can be asked for anywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One configuration of a kernel: block_m samples, block_n neurons, chunks x block_d columns."""

    block_m: int
    block_n: int
    block_d: int
    chunks: int
    warps: int
    stages: int
    per_sm: int  # programs that fit on a multiprocessor, by registers and shared memory

    @property
    def width(self) -> int:
        return self.block_d * self.chunks


class Patches(NamedTuple):
    """Geometry of a convolution whose patches are the samples."""

    channels: int
    height: int
    width: int
    taps_wide: int
    out_height: int
    out_width: int
    stride_down: int
    stride_right: int
    padding_down: int
    padding_right: int
    dilation_down: int
    dilation_right: int


class Plan(NamedTuple):
    """The backend that runs, "fused", "projected" or "aten", and why not those before it."""

    backend: str
    refused: tuple[tuple[str, str], ...]
    tile: Tile | None = None  # of "fused"
    precision: str = "ieee"


# Tiles of the fused kernel by generation and kind of product, narrowest first. An accumulator of
# 128 x 384 in float32 takes 192 of a thread's 255 registers on 8 warps, which leaves room for P of
# 32 samples and no more. Hopper's tensor cores want 64 rows for every 4 warps; Ampere's keep their
# operands in registers, and cards of its kind have 99 KiB of shared memory.
FUSED: dict[tuple[int, str], tuple[Tile, ...]] = {
    (90, "16 bit"): (
        Tile(64, 128, 32, 1, 8, 3, 2),
        Tile(32, 128, 64, 1, 8, 4, 2),
        Tile(64, 128, 128, 1, 8, 3, 1),
        Tile(64, 128, 64, 3, 8, 3, 1),
        Tile(64, 128, 128, 2, 8, 3, 1),
        Tile(32, 128, 128, 3, 8, 2, 1),
    ),
    (90, "tf32"): (Tile(32, 128, 64, 1, 8, 3, 1), Tile(32, 128, 64, 2, 8, 2, 1)),
    (90, "ieee"): (Tile(32, 64, 32, 1, 4, 2, 3), Tile(32, 64, 64, 1, 8, 2, 2)),
    (80, "16 bit"): (
        Tile(32, 64, 64, 1, 4, 3, 2),
        Tile(64, 64, 128, 1, 4, 3, 2),
        Tile(32, 64, 256, 1, 4, 3, 1),
    ),
    (80, "tf32"): (Tile(32, 64, 64, 1, 4, 2, 2), Tile(16, 64, 128, 1, 4, 3, 2)),
    (80, "ieee"): (Tile(32, 64, 32, 1, 4, 2, 3), Tile(32, 64, 64, 1, 8, 2, 2)),
}
# Of the two kernels of "projected", which are for 16 bits only.
PROJECT = {90: Tile(128, 128, 64, 1, 8, 3, 2), 80: Tile(128, 128, 32, 1, 8, 3, 2)}
COMBINE = {90: Tile(64, 128, 256, 1, 8, 3, 1), 80: Tile(32, 128, 128, 1, 4, 3, 2)}

_PASS_BYTES = 2**28
# Samples are counted in 32 bits, with room for the last split's.
MOST_ROWS = 2**31 - 2**16
# What a program costs beside its samples, in tiles of samples: filling the pipeline, and writing
# and reading a partial sum.
_FIXED_TILES = 4


def plan(
    rows: int,
    width: int,
    dtype: torch.dtype,
    *,
    capability: tuple[int, int],
    tf32: bool,
    patches: bool = False,
) -> Plan:
    """Which kernels compute y for `rows` samples of `width` columns, and why not the others.

    Args:
        rows, width: M and d; for convolutions the number of patches and their size.
        dtype: of the inputs.
        capability: of the GPU, as torch.cuda.get_device_capability() states it.
        tf32: whether float32 products may be rounded to TF32 (torch's setting for matrices).
        patches: whether the samples are patches of images.
    """
    refused: list[tuple[str, str]] = []

    def refuse(names: tuple[str, ...], reason: str) -> None:
        refused.extend((name, reason) for name in names)

    both = ("fused", "projected")
    if reason := old_gpu(capability):
        refuse(both, reason)
    elif dtype == torch.float64:
        refuse(both, "float64 is left to the vendor's products")
    elif rows >= MOST_ROWS:
        refuse(both, "the samples are counted in 32 bits")
    elif patches and dtype == torch.float32:
        refuse(both, "float32 convolutions follow torch's own setting of TF32 for convolutions")
    else:
        kind = "16 bit" if dtype.itemsize == 2 else "tf32" if tf32 else "ieee"
        tile = fused_tile(capability, kind, width)
        if tile is not None:
            return Plan("fused", (), tile, "tf32" if kind == "tf32" else "ieee")
        widest = FUSED[generation(capability), kind][-1].width
        refuse(("fused",), f"{width} columns do not fit into registers; {widest} do")
        if kind == "16 bit":
            return Plan("projected", tuple(refused))
        refuse(("projected",), "the vendor's float32 products are faster than Triton's")
    return Plan("aten", tuple(refused))


def old_gpu(capability: tuple[int, int]) -> str | None:
    """Why a GPU is too old for the kernels."""
    if capability >= (8, 0):
        return None
    return f"the GPU's compute capability is {'.'.join(map(str, capability))}; 8.0 is needed"


def generation(capability: tuple[int, int]) -> int:
    """Which tiles a GPU takes: Hopper's (its big chips) or those that fit everywhere."""
    return 90 if capability[0] == 9 else 80


def fused_tile(capability: tuple[int, int], kind: str, width: int) -> Tile | None:
    """The narrowest tile of the fused kernel that holds `width` columns."""
    tiles = FUSED[generation(capability), kind]
    return next((tile for tile in tiles if tile.width >= width), None)


@lru_cache(maxsize=1024)
def choose_splits(columns: int, rows: int, block_m: int, programs: int) -> tuple[int, int]:
    """How often the samples are split, and the samples of a split, a multiple of `block_m`.

    With s splits, columns * s programs run in waves of `programs`; the fewest steps win.
    """
    tiles = max(1, -(-rows // block_m))
    most = min(tiles, max(1, -(-2 * programs // columns)))

    def steps(splits: int) -> int:
        return -(-columns * splits // programs) * (-(-tiles // splits) + _FIXED_TILES)

    best = min(range(1, most + 1), key=steps)
    per_split = -(-tiles // best)
    return -(-tiles // per_split), per_split * block_m


def rows_per_pass(rows: int, row_bytes: int, block_m: int) -> int:
    """Samples whose P is in memory at a time: `_PASS_BYTES` of it, in passes of equal size."""
    passes = max(1, -(-rows * row_bytes // _PASS_BYTES))
    return min(rows, -(-rows // (passes * block_m)) * block_m)
