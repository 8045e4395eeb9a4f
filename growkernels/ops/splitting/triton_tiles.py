"""Tile configurations of the Triton kernels, and how a launch divides the samples."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


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
# What a program costs beside its samples, in tiles of samples: filling the pipeline, and writing
# and reading a partial sum.
_FIXED_TILES = 4


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
