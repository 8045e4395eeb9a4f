"""Products with splitting matrices on a GPU, in Triton.

Y_i = sum_m w[m, i] (x_m . v_i) x_m is a matrix product, an elementwise product and a transposed
matrix product, as in attention with x for both keys and values and w in place of the softmax.

- `fused`: one kernel, where an output row and all of x_m fit into a tile. x is loaded once for both
  products, P = (x v^T) * w never leaves the registers.
- `projected`: two kernels for wider rows. The first multiplies by w while P is in registers and
  writes it, some 2^28 bytes of samples at a time; the second is P^T x.

Both split the samples among programs so as to fill the GPU. Partial sums are float32 and are added
in a fixed order by a kernel of their own. The rows of a convolution are patches, which are
addressed in the image where they lie (channels innermost) and never written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from growkernels.ops.splitting.triton_tiles import Patches
from growkernels.ops.triton_tf32 import rounded_to_tf32

REDUCE_BLOCK = 1024
WEIGHT_BLOCK = 2048


@triton.jit
def _load_rows(x, start, last, columns, width, stride, BLOCK_M: tl.constexpr, PATCH: tl.constexpr):
    """Columns of the samples start..start + BLOCK_M; zero from `last` and from `width` on.

    PATCH has the fields of `Patches`, of which Triton makes constants.
    """
    m = start + tl.arange(0, BLOCK_M)
    inside = (m < last)[:, None] & (columns < width)[None, :]
    if PATCH is None:
        base = x + m.to(tl.int64)[:, None] * stride
        offsets = columns[None, :]
    else:
        channels: tl.constexpr = PATCH[0]
        height: tl.constexpr = PATCH[1]
        image_width: tl.constexpr = PATCH[2]
        taps_wide: tl.constexpr = PATCH[3]
        out_height: tl.constexpr = PATCH[4]
        out_width: tl.constexpr = PATCH[5]
        pixel = m % (out_height * out_width)
        top = (pixel // out_width) * PATCH[6] - PATCH[8]
        left = (pixel % out_width) * PATCH[7] - PATCH[9]
        tap = columns // channels
        down = (tap // taps_wide) * PATCH[10]
        right = (tap % taps_wide) * PATCH[11]
        row = top[:, None] + down[None, :]
        column = left[:, None] + right[None, :]
        inside &= (row >= 0) & (row < height) & (column >= 0) & (column < image_width)
        image = (m // (out_height * out_width)).to(tl.int64) * (height * image_width)
        corner = (image + top * image_width + left) * channels
        base = x
        offsets = (
            corner[:, None]
            + ((down * image_width + right) * channels + columns % channels)[None, :]
        )
    return tl.load(base + offsets, mask=inside, other=0.0)


@triton.jit
def _factor(values, PRECISION: tl.constexpr):
    """What a product with this `input_precision` is given."""
    if PRECISION == "tf32":
        values = rounded_to_tf32(values)
    return values


@triton.jit
def _load_weights(
    w, start, last, first_neuron, neurons, stride_m, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of w, zero from `last` and from `neurons` on."""
    m = start + tl.arange(0, BLOCK_M)
    n = first_neuron + tl.arange(0, BLOCK_N)
    rows = w + m.to(tl.int64)[:, None] * stride_m
    inside = (m < last)[:, None] & (n < neurons)[None, :]
    return tl.load(rows + n.to(tl.int64)[None, :] * stride_n, mask=inside, other=0.0)


@triton.jit
def fused_kernel(
    x, w, v, out, rows, neurons, width, k, rows_per_split, stride_x, stride_wm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr, PATCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[split, i, vector] = sum over the split's samples; at most 3 chunks of columns.

    P is computed transposed, so that its accumulator is the second product's left operand without
    a detour through shared memory. Vectors of one neuron are programs of their own, next to each
    other: they find their neuron's weights in the cache.
    """
    vector = tl.program_id(0) % k
    first_neuron = tl.program_id(0) // k * BLOCK_N
    split = tl.program_id(1)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    n = first_neuron + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    v_rows = v + ((n.to(tl.int64) * k + vector) * width)[:, None]
    present = (n < neurons)[:, None]
    v0 = tl.load(v_rows + d[None, :], mask=present & (d < width)[None, :], other=0.0)
    v0 = _factor(v0, PRECISION)
    sum0 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if CHUNKS > 1:
        d1 = BLOCK_D + d
        v1 = tl.load(v_rows + d1[None, :], mask=present & (d1 < width)[None, :], other=0.0)
        v1 = _factor(v1, PRECISION)
        sum1 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if CHUNKS > 2:
        d2 = 2 * BLOCK_D + d
        v2 = tl.load(v_rows + d2[None, :], mask=present & (d2 < width)[None, :], other=0.0)
        v2 = _factor(v2, PRECISION)
        sum2 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        x0 = _load_rows(x, start, last, d, width, stride_x, BLOCK_M, PATCH)
        x0 = _factor(x0, PRECISION)
        p = tl.dot(v0, tl.trans(x0), input_precision=PRECISION)
        if CHUNKS > 1:
            x1 = _load_rows(x, start, last, d1, width, stride_x, BLOCK_M, PATCH)
            x1 = _factor(x1, PRECISION)
            p = tl.dot(v1, tl.trans(x1), p, input_precision=PRECISION)
        if CHUNKS > 2:
            x2 = _load_rows(x, start, last, d2, width, stride_x, BLOCK_M, PATCH)
            x2 = _factor(x2, PRECISION)
            p = tl.dot(v2, tl.trans(x2), p, input_precision=PRECISION)
        weights = _load_weights(
            w, start, last, first_neuron, neurons, stride_wm, stride_wn, BLOCK_M, BLOCK_N
        )
        p = _factor((p * tl.trans(weights)).to(x0.dtype), PRECISION)
        sum0 = tl.dot(p, x0, sum0, input_precision=PRECISION)
        if CHUNKS > 1:
            sum1 = tl.dot(p, x1, sum1, input_precision=PRECISION)
        if CHUNKS > 2:
            sum2 = tl.dot(p, x2, sum2, input_precision=PRECISION)
    out_rows = out + (((split.to(tl.int64) * neurons + n) * k + vector) * width)[:, None]
    tl.store(out_rows + d[None, :], sum0, mask=present & (d < width)[None, :])
    if CHUNKS > 1:
        tl.store(out_rows + d1[None, :], sum1, mask=present & (d1 < width)[None, :])
    if CHUNKS > 2:
        tl.store(out_rows + d2[None, :], sum2, mask=present & (d2 < width)[None, :])


@triton.jit
def project_kernel(
    x, w, v, p, first_row, rows, neurons, width, k, x_width, stride_x, stride_wm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, PATCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p[m, vector, i] = w[m, i] (x_m . v[i, vector]) for the samples from `first_row` to `rows`.

    With 2 PARTS, columns of v beyond those of x meet x from its start again, and p[m, vector] is
    what the 16 bits of p hold of the result, followed by what they hold of the rest.
    """
    columns = tl.cdiv(neurons, BLOCK_N) * k
    vector = tl.program_id(0) % columns % k
    first_neuron = tl.program_id(0) % columns // k * BLOCK_N
    local = tl.program_id(0) // columns * BLOCK_M
    start = first_row + local
    n = first_neuron + tl.arange(0, BLOCK_N)
    present = n < neurons
    v_rows = v + ((n.to(tl.int64) * k + vector) * width)[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        d = begin + tl.arange(0, BLOCK_D)
        if PARTS == 1:
            tile = _load_rows(x, start, rows, d, width, stride_x, BLOCK_M, PATCH)
        else:
            tile = _load_rows(x, start, rows, d % x_width, x_width, stride_x, BLOCK_M, PATCH)
        vectors = tl.load(
            v_rows + d[:, None], mask=(d < width)[:, None] & present[None, :], other=0.0
        )
        product = tl.dot(tile, vectors, product)
    weights = _load_weights(
        w, start, rows, first_neuron, neurons, stride_wm, stride_wn, BLOCK_M, BLOCK_N
    )
    m = tl.arange(0, BLOCK_M)
    inside = (start + m < rows)[:, None] & present[None, :]
    result = product * weights
    rounded = result.to(p.dtype.element_ty)
    p_tile = p + ((local.to(tl.int64) + m) * k + vector)[:, None] * PARTS * neurons + n[None, :]
    tl.store(p_tile, rounded, mask=inside)
    if PARTS == 2:
        tl.store(p_tile + neurons, result - rounded.to(tl.float32), mask=inside)


@triton.jit
def combine_kernel(
    x, p, out, first_row, rows, neurons, width, k, rows_per_split, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PATCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[split, i, vector] = sum of p[m, vector, i] x_m over the split's samples."""
    vector = tl.program_id(0) % k
    first_neuron = tl.program_id(0) // k * BLOCK_N
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    first = first_row + split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    n = first_neuron + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        projections = _load_weights(
            p + vector.to(tl.int64) * neurons, start - first_row, last - first_row,
            first_neuron, neurons, k * neurons, 1, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        tile = _load_rows(x, start, last, d, width, stride_x, BLOCK_M, PATCH)
        total = tl.dot(tl.trans(projections), tile, total)
    out_rows = out + (((split.to(tl.int64) * neurons + n) * k + vector) * width)[:, None]
    tl.store(out_rows + d[None, :], total, mask=(n < neurons)[:, None] & (d < width)[None, :])


@triton.jit
def reduce_kernel(
    partial, out, splits, size, channels, taps, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums the partial results in order; the taps of a filter go from outside to inside."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * size + at, mask=inside, other=0.0)
    filter_size = channels * taps
    element = at % filter_size
    target = at - element + element % channels * taps + element // channels
    tl.store(out + target, total, mask=inside)


@triton.jit
def _second_derivative(z, beta, ACTIVATION: tl.constexpr):
    """act''(z) from exp(-|z|), so that nothing cancels in the tails; NaN comes through."""
    if ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "silu":
        # Beyond 1000 the exponential is zero, while what it is multiplied by may overflow.
        z = tl.where(z > 1000.0, 1000.0, tl.where(z < -1000.0, -1000.0, z))
    if ACTIVATION == "gelu":
        square = z * z
        result = tl.exp(-0.5 * square) * 0.3989422804014327 * (2.0 - square)
    elif ACTIVATION == "gelu_tanh":
        # z (1 + t) / 2, t = tanh u: with q = 1 - t^2, f'' = q (u' + z (u'' - 2 t u'^2) / 2).
        square = z * z
        u = 0.7978845608028654 * z * (1.0 + 0.044715 * square)
        decay = tl.exp(-2.0 * tl.abs(u))
        t = tl.where(z < 0, decay - 1.0, 1.0 - decay) / (1.0 + decay)
        first = 0.7978845608028654 * (1.0 + 0.134145 * square)
        second = 0.21406191778115836 * z
        q = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        result = q * (first + 0.5 * z * (second - 2.0 * t * first * first))
    elif ACTIVATION == "tanh":
        decay = tl.exp(-2.0 * tl.abs(z))
        total = 1.0 + decay
        size = 8.0 * decay * (1.0 - decay) / (total * total * total)
        result = tl.where(z < 0, size, -size)
    else:
        # With s = sigmoid(u): bell = s (1 - s), tilt = 1 - 2 s.
        u = z
        if ACTIVATION == "softplus":
            u = beta * z
        decay = tl.exp(-tl.abs(u))
        bell = decay / ((1.0 + decay) * (1.0 + decay))
        tilt = tl.where(u < 0, 1.0 - decay, decay - 1.0) / (1.0 + decay)
        if ACTIVATION == "silu":
            result = bell * (2.0 + z * tilt)
        elif ACTIVATION == "sigmoid":
            result = bell * tilt
        else:
            result = beta * bell
    return result


@triton.jit
def weight_kernel(
    grad, preact, out, size, beta, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = grad * act''(preact) on flat memory, in float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(preact + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, g * _second_derivative(z, beta, ACTIVATION), mask=inside)


def patch_constants(patches: Patches | None) -> tuple[int, ...] | None:
    return None if patches is None else tuple(patches)
