"""Triton kernels of the family, and the functions that launch them.

Images are rows of channels here: one row per position, [N * H * W, C], which is what a
channels_last tensor is in memory. The rows of a slice of channels lie further apart than they are
long.

- `convolve`: the maps z as an implicit matrix product over taps and input channels. A program has
  all R maps of its positions in registers, where it mixes them into the other channels; both are
  written straight to y.
- `mix`: the same for maps that exist already.
- `coefficient_backward`: dz, dcoeff and dbias in one pass over the gradient. Every program sums
  over its own positions, and a second kernel adds the programs' sums in a fixed order.

Sums are kept in float32. float32 factors are rounded to TF32, so `gpu.decide` leaves float32
without TF32 to the vendor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from growkernels.ops.triton_build import TritonBuild


class ForwardTile(NamedTuple):
    """Positions of a program, maps it has room for, combinations it computes at a time."""

    positions: int
    filters: int
    combinations: int
    warps: int
    stages: int

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
MOST_FILTERS = 256
_SUM_ELEMENTS, _SUM_PROGRAMS = 64, 32


def forward_tile(
    filters: int, positions: int, dtype: torch.dtype, multiprocessors: int
) -> ForwardTile:
    """The tile for so many maps and positions; `filters` is at most MOST_FILTERS."""
    fitting = [tile for tile in FORWARD_TILES[dtype.itemsize] if tile.filters >= filters]
    tile, *others = [tile for tile in fitting if tile.filters == fitting[0].filters]
    if others and triton.cdiv(positions, tile.positions) < multiprocessors:
        return others[0]
    return tile


def backward_tile(filters: int, combinations: int, dtype: torch.dtype) -> BackwardTile | None:
    """The tile for so many maps and combinations, None where there is none."""
    for tile in BACKWARD_TILES[dtype.itemsize]:
        if tile.filters >= filters and tile.combinations >= combinations:
            return tile
    return None


def as_rows(images: Tensor) -> Tensor:
    """[N * H * W, C] with adjacent channels, a view where the layout allows it."""
    rows = images.permute(0, 2, 3, 1).flatten(0, 2)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@triton.jit
def _first_row(position, row):
    """Where the row of a position begins; only this number needs 64 bits."""
    return tl.cast(position, tl.int64) * row


@triton.jit
def _write_outputs(
    maps, first, inside, coeff, bias, y, z, filters, combinations, KEEP_MAPS: tl.constexpr,
    POSITIONS: tl.constexpr, FILTERS: tl.constexpr, COMBINATIONS: tl.constexpr,
):  # fmt: skip
    """Writes the maps [POSITIONS, FILTERS] and their combinations to y, the maps to z if given."""
    local = tl.arange(0, POSITIONS)
    f = tl.arange(0, FILTERS)
    f_inside = f < filters
    outputs = combinations
    if KEEP_MAPS:
        outputs += filters
    y_rows = y + _first_row(first, outputs) + local[:, None] * outputs
    mask = inside[:, None] & f_inside[None, :]
    if z is not None:
        z_rows = z + _first_row(first, filters) + local[:, None] * filters
        tl.store(z_rows + f[None, :], maps, mask=mask)
    if KEEP_MAPS:
        top = maps
        if bias is not None:
            top += tl.load(bias + f, mask=f_inside, other=0.0).to(tl.float32)[None, :]
        tl.store(y_rows + f[None, :], top, mask=mask)
        y_rows += filters
        if bias is not None:
            bias += filters
    # Filters that do not exist would turn infinities into NaN.
    factors = tl.where(f_inside[None, :], maps, 0.0).to(coeff.dtype.element_ty)
    for first in range(0, combinations, COMBINATIONS):
        o = first + tl.arange(0, COMBINATIONS)
        o_inside = o < combinations
        weights = tl.load(
            coeff + o[:, None] * filters + f[None, :],
            mask=o_inside[:, None] & f_inside[None, :], other=0.0,
        )  # fmt: skip
        mixed = tl.dot(factors, tl.trans(weights), input_precision="tf32")
        if bias is not None:
            mixed += tl.load(bias + o, mask=o_inside, other=0.0).to(tl.float32)[None, :]
        tl.store(y_rows + o[None, :], mixed, mask=inside[:, None] & o_inside[None, :])


@triton.jit
def convolve_kernel(
    x, basis, coeff, bias, y, z,
    positions, height, width, channels, x_pixel, filters, combinations, out_height, out_width,
    kernel_height, kernel_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KEEP_MAPS: tl.constexpr, POSITIONS: tl.constexpr, FILTERS: tl.constexpr, DEPTH: tl.constexpr,
    COMBINATIONS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * POSITIONS
    position = first + tl.arange(0, POSITIONS)
    inside = position < positions
    column = position % out_width
    row = (position // out_width) % out_height
    image = position // (out_width * out_height)
    top = row * stride_h - padding_h
    left = column * stride_w - padding_w
    corner = x + ((image.to(tl.int64) * height + top) * width + left)[:, None] * x_pixel
    f = tl.arange(0, FILTERS)
    f_inside = f < filters
    taps = kernel_height * kernel_width
    filter_rows = basis + f[:, None] * (taps * channels)
    chunks = tl.cdiv(channels, DEPTH)
    maps = tl.zeros([POSITIONS, FILTERS], tl.float32)
    for step in range(0, taps * chunks):
        tap = step // chunks
        c = (step % chunks) * DEPTH + tl.arange(0, DEPTH)
        c_inside = c < channels
        down = (tap // kernel_width) * dilation_h
        right = (tap % kernel_width) * dilation_w
        in_image = inside & (top + down >= 0) & (top + down < height)
        in_image &= (left + right >= 0) & (left + right < width)
        pixels = tl.load(
            corner + ((down * width + right) * x_pixel + c)[None, :],
            mask=in_image[:, None] & c_inside[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            filter_rows + (tap * channels + c)[None, :],
            mask=f_inside[:, None] & c_inside[None, :], other=0.0,
        )  # fmt: skip
        maps = tl.dot(pixels, tl.trans(weights), maps, input_precision="tf32")
    _write_outputs(
        maps, first, inside, coeff, bias, y, z, filters, combinations,
        KEEP_MAPS, POSITIONS, FILTERS, COMBINATIONS,
    )  # fmt: skip


@triton.jit
def mix_kernel(
    maps, coeff, bias, y, positions, maps_row, filters, combinations,
    KEEP_MAPS: tl.constexpr, POSITIONS: tl.constexpr, FILTERS: tl.constexpr,
    COMBINATIONS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * POSITIONS
    local = tl.arange(0, POSITIONS)
    inside = local < positions - first
    f = tl.arange(0, FILTERS)
    rows = maps + _first_row(first, maps_row) + local[:, None] * maps_row
    own = tl.load(rows + f[None, :], mask=inside[:, None] & (f < filters)[None, :], other=0.0)
    _write_outputs(
        own.to(tl.float32), first, inside, coeff, bias, y, None, filters, combinations,
        KEEP_MAPS, POSITIONS, FILTERS, COMBINATIONS,
    )  # fmt: skip


@triton.jit
def coefficient_backward_kernel(
    grad, maps, maps_bias, coeff, dmaps, sums,
    positions, grad_row, maps_row, filters, combinations,
    KEEP_MAPS: tl.constexpr, DMAPS: tl.constexpr, DCOEFF: tl.constexpr, DBIAS: tl.constexpr,
    POSITIONS: tl.constexpr, FILTERS: tl.constexpr, COMBINATIONS: tl.constexpr,
):  # fmt: skip
    """A row of `sums` per program: dcoeff [combinations, filters], then dbias, as far as wanted."""
    local = tl.arange(0, POSITIONS)
    f = tl.arange(0, FILTERS)
    o = tl.arange(0, COMBINATIONS)
    f_inside = f < filters
    o_inside = o < combinations
    products = o[:, None] * filters + f[None, :]
    exists = o_inside[:, None] & f_inside[None, :]
    if DMAPS:
        weights = tl.load(coeff + products, mask=exists, other=0.0)
    if DCOEFF:
        dcoeff = tl.zeros([COMBINATIONS, FILTERS], tl.float32)
        if maps_bias is not None:
            offset = tl.load(maps_bias + f, mask=f_inside, other=0.0).to(tl.float32)[None, :]
    if DBIAS:
        dbias_top = tl.zeros([FILTERS], tl.float32)
        dbias_rest = tl.zeros([COMBINATIONS], tl.float32)
    first_rest = 0
    if KEEP_MAPS:
        first_rest = filters
    for first in range(tl.program_id(0) * POSITIONS, positions, tl.num_programs(0) * POSITIONS):
        inside = local < positions - first
        at_filters = inside[:, None] & f_inside[None, :]
        grads = grad + _first_row(first, grad_row) + local[:, None] * grad_row
        rest = tl.load(
            grads + (first_rest + o)[None, :], mask=inside[:, None] & o_inside[None, :], other=0.0
        )
        if KEEP_MAPS and (DMAPS or DBIAS):
            top = tl.load(grads + f[None, :], mask=at_filters, other=0.0).to(tl.float32)
        if DMAPS:
            dz = tl.dot(rest, weights, input_precision="tf32")
            if KEEP_MAPS:
                dz += top
            dmaps_rows = dmaps + _first_row(first, filters) + local[:, None] * filters
            tl.store(dmaps_rows + f[None, :], dz, mask=at_filters)
        if DCOEFF:
            rows = maps + _first_row(first, maps_row) + local[:, None] * maps_row
            own = tl.load(rows + f[None, :], mask=at_filters, other=0.0)
            if maps_bias is not None:
                own = (own.to(tl.float32) - offset).to(own.dtype)
            dcoeff = tl.dot(tl.trans(rest), own, dcoeff, input_precision="tf32")
        if DBIAS:
            dbias_rest += tl.sum(rest.to(tl.float32), 0)
            if KEEP_MAPS:
                dbias_top += tl.sum(top, 0)
    length = 0
    if DCOEFF:
        length += combinations * filters
    if DBIAS:
        length += first_rest + combinations
    own_sums = sums + tl.program_id(0) * length
    if DCOEFF:
        tl.store(own_sums + products, dcoeff, mask=exists)
        own_sums += combinations * filters
    if DBIAS:
        if KEEP_MAPS:
            tl.store(own_sums + f, dbias_top, mask=f_inside)
        tl.store(own_sums + first_rest + o, dbias_rest, mask=o_inside)


@triton.jit
def add_sums_kernel(
    sums, dcoeff, dbias, programs, products, channels,
    ELEMENTS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """dcoeff [products] and dbias [channels]: the rows of `sums`, added in a fixed order."""
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    length = products + channels
    total = tl.zeros([ELEMENTS], tl.float32)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        part = tl.load(
            sums + program[:, None] * length + element[None, :],
            mask=(program < programs)[:, None] & (element < length)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(part, 0)
    if dcoeff is not None:
        tl.store(dcoeff + element, total, mask=element < products)
    if dbias is not None:
        tl.store(dbias + element - products, total, mask=(element >= products) & (element < length))


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
    multiprocessors: int,
    tile: ForwardTile | None = None,
) -> None:
    """Writes y, and z where it is given, both channels_last and not empty.

    y has R + Cout channels where coeff has Cout rows, or Cout where the maps are not a part of y.
    """
    filters, channels, *kernel = basis.shape
    combinations = len(coeff)
    positions = y.numel() // y.shape[1]
    tile = tile or forward_tile(filters, positions, y.dtype, multiprocessors)
    rows = as_rows(x)
    convolve_kernel[(triton.cdiv(positions, tile.positions),)](
        rows, basis.permute(0, 2, 3, 1).contiguous(), coeff.contiguous(), _dense(bias), y, z,
        positions, *x.shape[2:], channels, rows.stride(0), filters, combinations, *y.shape[2:],
        *kernel, *stride, *padding, *dilation,
        KEEP_MAPS=y.shape[1] > combinations, POSITIONS=tile.positions, FILTERS=tile.filters,
        DEPTH=tile.depth(x.dtype), COMBINATIONS=tile.combinations,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def mix(
    maps: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    y: Tensor,
    multiprocessors: int,
    tile: ForwardTile | None = None,
) -> None:
    """Writes y, channels_last and not empty, out of the maps; its channels as in `convolve`."""
    filters, combinations = maps.shape[1], len(coeff)
    positions = y.numel() // y.shape[1]
    tile = tile or forward_tile(filters, positions, y.dtype, multiprocessors)
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
    tile: BackwardTile | None = None,
) -> None:
    """Writes the gradients that are given, of z (channels_last), coeff and bias, for that of y.

    `maps` contains `maps_bias` where that is given. No argument is empty.
    """
    combinations, filters = coeff.shape
    tile = tile or backward_tile(filters, combinations, grad.dtype)
    assert tile is not None, "the caller asks backward_tile first"
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
        add_sums_kernel[(triton.cdiv(products + channels, _SUM_ELEMENTS),)](
            sums, dcoeff, dbias, programs, products, channels,
            ELEMENTS=_SUM_ELEMENTS, PROGRAMS=_SUM_PROGRAMS, num_warps=4,
        )  # fmt: skip


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


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
        for tile in FORWARD_TILES[dtype.itemsize]:
            shape = {
                "KEEP_MAPS": True, "POSITIONS": tile.positions, "FILTERS": tile.filters,
                "COMBINATIONS": tile.combinations,
            }  # fmt: skip
            label = f"{_TYPES[dtype]} {tile.positions}x{tile.filters}"
            yield TritonBuild(
                f"convolve {label}", convolve_kernel,
                dict.fromkeys(("x", "basis", "coeff", "y"), pointer)
                | dict.fromkeys(sizes, "i32:16") | form,
                {"bias": None, "z": None, **ones, **shape, "DEPTH": tile.depth(dtype)},
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
        {"dbias": None, "channels": 0, "ELEMENTS": _SUM_ELEMENTS, "PROGRAMS": _SUM_PROGRAMS}, 4, 3,
    )  # fmt: skip
