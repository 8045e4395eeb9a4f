"""Triton kernels of the family.

Images are rows of channels here: one row per position, [N * H * W, C], which is what a
channels_last tensor is in memory. The rows of a slice of channels lie further apart than they are
long.

- `convolve_kernel`: the maps z as an implicit matrix product over taps and input channels. A
  program has all R maps of its positions in registers, where it mixes them into the other channels;
  both are written straight to y.
- `convolve_rows_kernel`: the same for kernels 3 wide, with a third of the loads.
- `mix_kernel`: the combinations of maps that exist already.
- `coefficient_backward_kernel`: dz, dcoeff and dbias in one pass over the gradient. Every program
  sums over its own positions; `add_sums_kernel` adds the programs' sums in a fixed order.

Sums are kept in float32. float32 factors are rounded to TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from growkernels.ops.triton_tf32 import rounded_to_tf32

# Of `add_sums_kernel`: elements of a program, and programs' sums it reads at a time.
SUM_ELEMENTS, SUM_PROGRAMS = 64, 32


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
    factors = rounded_to_tf32(factors)
    for first in range(0, combinations, COMBINATIONS):
        o = first + tl.arange(0, COMBINATIONS)
        o_inside = o < combinations
        weights = tl.load(
            coeff + o[:, None] * filters + f[None, :],
            mask=o_inside[:, None] & f_inside[None, :], other=0.0,
        )  # fmt: skip
        weights = rounded_to_tf32(weights)
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
        pixels, weights = rounded_to_tf32(pixels), rounded_to_tf32(weights)
        maps = tl.dot(pixels, tl.trans(weights), maps, input_precision="tf32")
    _write_outputs(
        maps, first, inside, coeff, bias, y, z, filters, combinations,
        KEEP_MAPS, POSITIONS, FILTERS, COMBINATIONS,
    )  # fmt: skip


@triton.jit
def _shifted(values, by: tl.constexpr, POSITIONS: tl.constexpr, FILTERS: tl.constexpr):
    """values[position + by] at every position; at the ends some other row."""
    source = tl.minimum(tl.maximum(tl.arange(0, POSITIONS) + by, 0), POSITIONS - 1)
    return tl.gather(values, source[:, None] + tl.zeros([POSITIONS, FILTERS], tl.int32), 0)


@triton.jit
def convolve_rows_kernel(
    x, basis, coeff, bias, y, z,
    positions, height, width, channels, x_pixel, filters, combinations, out_height,
    kernel_height, padding_h, dilation_h,
    KEEP_MAPS: tl.constexpr, POSITIONS: tl.constexpr, FILTERS: tl.constexpr, DEPTH: tl.constexpr,
    COMBINATIONS: tl.constexpr,
):  # fmt: skip
    """`convolve_kernel` where a program has whole rows of images and kernels are 3 wide.

    A pixel is loaded once for its three taps in a row; the sums are brought together at the end.
    """
    first = tl.program_id(0) * POSITIONS
    local = tl.arange(0, POSITIONS)
    position = first + local
    inside = position < positions
    column = position % width
    row = (position // width) % out_height
    top = row - padding_h
    image = position // (width * out_height)
    corner = x + ((image.to(tl.int64) * height + top) * width + column)[:, None] * x_pixel
    f = tl.arange(0, FILTERS)
    f_inside = f < filters
    filter_rows = basis + f[:, None] * (3 * kernel_height * channels)
    chunks = tl.cdiv(channels, DEPTH)
    left = tl.zeros([POSITIONS, FILTERS], tl.float32)
    middle = tl.zeros([POSITIONS, FILTERS], tl.float32)
    right = tl.zeros([POSITIONS, FILTERS], tl.float32)
    for step in range(0, kernel_height * chunks):
        tap = step // chunks
        c = (step % chunks) * DEPTH + tl.arange(0, DEPTH)
        c_inside = c < channels
        down = tap * dilation_h
        in_image = inside & (top + down >= 0) & (top + down < height)
        pixels = tl.load(
            corner + (down * width * x_pixel + c)[None, :],
            mask=in_image[:, None] & c_inside[None, :], other=0.0,
        )  # fmt: skip
        weights = filter_rows + (3 * tap * channels + c)[None, :]
        exists = f_inside[:, None] & c_inside[None, :]
        w0 = tl.load(weights, mask=exists, other=0.0)
        w1 = tl.load(weights + channels, mask=exists, other=0.0)
        w2 = tl.load(weights + 2 * channels, mask=exists, other=0.0)
        left = tl.dot(pixels, tl.trans(w0), left, input_precision="tf32")
        middle = tl.dot(pixels, tl.trans(w1), middle, input_precision="tf32")
        right = tl.dot(pixels, tl.trans(w2), right, input_precision="tf32")
    maps = middle
    maps += tl.where(column[:, None] > 0, _shifted(left, -1, POSITIONS, FILTERS), 0.0)
    maps += tl.where(column[:, None] < width - 1, _shifted(right, 1, POSITIONS, FILTERS), 0.0)
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
        weights = rounded_to_tf32(tl.load(coeff + products, mask=exists, other=0.0))
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
        factors = rounded_to_tf32(rest)
        if DMAPS:
            dz = tl.dot(factors, weights, input_precision="tf32")
            if KEEP_MAPS:
                dz += top
            dmaps_rows = dmaps + _first_row(first, filters) + local[:, None] * filters
            tl.store(dmaps_rows + f[None, :], dz, mask=at_filters)
        if DCOEFF:
            rows = maps + _first_row(first, maps_row) + local[:, None] * maps_row
            own = tl.load(rows + f[None, :], mask=at_filters, other=0.0)
            if maps_bias is not None:
                own = (own.to(tl.float32) - offset).to(own.dtype)
            own = rounded_to_tf32(own)
            dcoeff = tl.dot(tl.trans(factors), own, dcoeff, input_precision="tf32")
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
