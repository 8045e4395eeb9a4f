"""Tile configurations of the Triton kernels, and which one a launch takes.

None of them spills registers on compute capability 8.0 or 9.0, where products of 16-bit values
compile to `wgmma` (with 64 positions or more).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ForwardTile(NamedTuple):
    """Positions of a program, maps it has room for, combinations it computes at a time.

    With `whole_rows` the positions are whole rows of an image: see `convolve_rows_kernel`.
    """

    positions: int
    filters: int
    combinations: int
    warps: int
    stages: int
    whole_rows: bool = False

    def depth(self, dtype: torch.dtype) -> int:
        """Input channels of one step: 128 bytes of every position."""
        return 128 // dtype.itemsize


class BackwardTile(NamedTuple):
    """Maps and combinations a program has room for, positions of one step."""

    filters: int
    combinations: int
    positions: int
    programs_per_multiprocessor: int
    warps: int
    stages: int


# By bytes of an element. The first with room for the maps is taken, and of those with the same room
# the second, of fewer positions, where the first would leave multiprocessors idle.
FORWARD_TILES = {
    2: (
        ForwardTile(128, 16, 32, 4, 4),
        ForwardTile(128, 32, 32, 4, 4),
        ForwardTile(128, 64, 64, 8, 3),
        ForwardTile(64, 64, 64, 4, 4),
        ForwardTile(128, 128, 64, 8, 3),
        ForwardTile(64, 128, 64, 8, 4),
        ForwardTile(128, 256, 64, 8, 3),
        ForwardTile(64, 256, 64, 8, 3),
    ),
    4: (
        ForwardTile(128, 16, 32, 4, 4),
        ForwardTile(128, 32, 32, 4, 4),
        ForwardTile(128, 64, 64, 8, 3),
        ForwardTile(64, 128, 64, 8, 3),
        ForwardTile(64, 256, 32, 8, 2),
    ),
}
ROW_TILES = {
    2: (
        ForwardTile(128, 16, 32, 8, 3, True),
        ForwardTile(128, 32, 32, 8, 3, True),
        ForwardTile(128, 64, 64, 8, 3, True),
    ),
}
BACKWARD_TILES = {
    2: (
        BackwardTile(32, 32, 128, 2, 4, 3),
        BackwardTile(32, 128, 64, 2, 4, 3),
        BackwardTile(64, 64, 64, 2, 4, 3),
        BackwardTile(64, 256, 64, 1, 8, 2),
        BackwardTile(128, 64, 64, 1, 8, 2),
    ),
    4: (
        BackwardTile(32, 32, 64, 2, 4, 2),
        BackwardTile(32, 128, 64, 2, 8, 2),
        BackwardTile(64, 64, 64, 2, 8, 2),
        BackwardTile(64, 128, 32, 1, 8, 2),
    ),
}
# The widest forward tiles take up to 144 KiB of shared memory. The others, by bytes of an element,
# and all backward tiles fit into the 99 KiB that every GPU has since compute capability 8.0.
MOST_FILTERS = 256
_MOST_FILTERS_IN_99_KIB = {2: 128, 4: 64}


def most_filters(dtype: torch.dtype, shared_bytes: int) -> int:
    """How many maps a program has room for on a GPU with so much shared memory."""
    return MOST_FILTERS if shared_bytes >= 144 * 1024 else _MOST_FILTERS_IN_99_KIB[dtype.itemsize]


def forward_tile(
    filters: int, positions: int, dtype: torch.dtype, multiprocessors: int, row: int | None = None
) -> ForwardTile:
    """The tile for so many maps and positions; `filters` is at most MOST_FILTERS.

    `row` is the width of an output that `convolve_rows_kernel` can compute.
    """
    fitting = [tile for tile in FORWARD_TILES[dtype.itemsize] if tile.filters >= filters]
    tile, *others = [tile for tile in fitting if tile.filters == fitting[0].filters]
    programs = -(-positions // tile.positions)
    if row is not None and programs >= multiprocessors:
        for by_rows in ROW_TILES.get(dtype.itemsize, ()):
            if by_rows.filters == tile.filters and by_rows.positions % row == 0:
                return by_rows
    return others[0] if others and programs < multiprocessors else tile


def backward_tile(filters: int, combinations: int, dtype: torch.dtype) -> BackwardTile | None:
    """The tile for so many maps and combinations, None where there is none."""
    for tile in BACKWARD_TILES[dtype.itemsize]:
        if tile.filters >= filters and tile.combinations >= combinations:
            return tile
    return None
