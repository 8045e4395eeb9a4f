"""Launches of the family's Triton kernels: what they are given, and how it is divided."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

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
from growkernels.ops.splitting.triton_tiles import Patches, Tile, choose_splits, rows_per_pass


def splitting_weight(
    grad: Tensor, preact: Tensor, out: Tensor, activation: str, beta: float | None
) -> None:
    """Writes grad * act''(preact) into `out`, which is dense in some order of its dimensions."""
    size = out.numel()
    grad, preact = (
        t if t.stride() == out.stride() else torch.empty_like(out).copy_(t) for t in (grad, preact)
    )
    weight_kernel[(triton.cdiv(size, WEIGHT_BLOCK),)](
        grad, preact, out, size, 1.0 if beta is None else beta,
        ACTIVATION="softplus" if activation == "relu" else activation, BLOCK=WEIGHT_BLOCK,
    )  # fmt: skip


class Product(NamedTuple):
    """What the kernels are given, for matrices and for patches."""

    x: Tensor  # [M, d] with adjacent columns, or dense images with channels innermost
    w: Tensor  # [M, n]
    v: Tensor  # [n, k, d], contiguous; taps before channels
    patches: Patches | None
    taps: int

    @property
    def row_stride(self) -> int:
        return self.x.stride(0) if self.patches is None else 0


def linear_product(x: Tensor, w: Tensor, v: Tensor) -> Product:
    """The arguments of `splitting_hvp`."""
    vectors = (v if v.dim() == 3 else v.unsqueeze(1)).contiguous()
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return Product(x, _with_a_unit_stride(w), vectors, None, 1)


def patch_product(
    x: Tensor, w: Tensor, v: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Product:
    """The arguments of `splitting_hvp_conv2d`."""
    filters = v if v.dim() == 5 else v.unsqueeze(1)
    n, k, channels, kh, kw = filters.shape
    vectors = filters.permute(0, 1, 3, 4, 2).reshape(n, k, -1).contiguous()
    images = x.permute(0, 2, 3, 1).contiguous()
    weights = _with_a_unit_stride(w.permute(0, 2, 3, 1).reshape(-1, n))
    if kh == kw == 1 and stride == [1, 1] and padding == [0, 0]:
        return Product(images.view(-1, channels), weights, vectors, None, 1)
    patches = Patches(
        channels, x.shape[2], x.shape[3], kw, w.shape[2], w.shape[3], *stride, *padding, *dilation
    )
    return Product(images, weights, vectors, patches, kh * kw)


def fused(product: Product, out: Tensor, tile: Tile, precision: str, programs: int) -> None:
    """Writes y into the contiguous `out`; `programs` run on the GPU at a time."""
    x, w, v, patches, taps = product
    rows, (n, k, width) = w.shape[0], v.shape
    columns = k * triton.cdiv(n, tile.block_n)
    splits, per_split = choose_splits(columns, rows, tile.block_m, programs)
    direct = splits == 1 and taps == 1
    partial = out if direct else out.new_empty((splits, *v.shape), dtype=torch.float32)
    fused_kernel[(columns, splits)](
        x, w, v, partial, rows, n, width, k, per_split, product.row_stride, *w.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, CHUNKS=tile.chunks,
        PRECISION=precision, PATCH=patch_constants(patches), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not direct:
        _reduce(partial, out, taps)


def projected(product: Product, out: Tensor, project: Tile, combine: Tile, sms: int) -> None:
    """The same by two kernels, with P [samples of a pass, k, n] in memory between them."""
    partial = _two_products(product, product.v.shape[-1], 1, project, combine, sms)
    _reduce(partial, out, product.taps)


class WideProduct:
    """v -> S v in float32 by products of bfloat16, some 16 bits of each factor, for any n vectors.

    x is cut into two numbers of bfloat16 whose sum is x to 2^-17 (one where it is bfloat16), v and
    P likewise. All products of parts are summed but the one of both remainders of x and v.
    """

    def __init__(self, x: Tensor, w: Tensor, project: Tile, combine: Tile, sms: int) -> None:
        """x [M, d] and w [M, n], of 16 or 32 bits."""
        self._x = x.contiguous() if x.dtype == torch.bfloat16 else torch.cat(_halves(x), 1)
        self._w = _with_a_unit_stride(w)
        self._launch = project, combine, sms

    def __call__(self, v: Tensor) -> Tensor:
        """v is [n, k, d] in float32, and so is the result."""
        n, k, width = v.shape
        high, low = _halves(v)
        x_parts = self._x.shape[1] // width
        vectors = torch.cat([high] * x_parts + [low], 2)
        product = Product(self._x, self._w, vectors, None, 1)
        with torch.cuda.device_of(v):
            partial = _two_products(product, x_parts * width, 2, *self._launch)
        return partial.view(-1, n, k, 2, x_parts, width).sum((0, 3, 4))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


def _two_products(
    product: Product, x_width: int, parts: int, project: Tile, combine: Tile, sms: int
) -> Tensor:
    """Partial sums [splits, n, k * parts, x_width] in float32."""
    x, w, v, patches, _ = product
    rows, (n, k, width) = w.shape[0], v.shape
    vectors = k * parts
    pass_rows = rows_per_pass(rows, n * vectors * x.element_size(), project.block_m)
    p = x.new_empty(pass_rows, vectors, n)
    blocks = vectors * triton.cdiv(n, combine.block_n), triton.cdiv(x_width, combine.block_d)
    splits, per_split = choose_splits(
        blocks[0] * blocks[1], pass_rows, combine.block_m, sms * combine.per_sm
    )
    grid = (*blocks, splits)
    passes = range(0, rows, pass_rows)
    partial = x.new_empty((len(passes), splits, n, vectors, x_width), dtype=torch.float32)
    columns = k * triton.cdiv(n, project.block_n)
    for first, sums in zip(passes, partial, strict=True):
        last = min(first + pass_rows, rows)
        project_kernel[(columns * triton.cdiv(last - first, project.block_m),)](
            x, w, v, p, first, last, n, width, k, x_width, product.row_stride, *w.stride(),
            BLOCK_M=project.block_m, BLOCK_N=project.block_n, BLOCK_D=project.block_d,
            PARTS=parts, PATCH=patch_constants(patches), STAGES=project.stages,
            num_warps=project.warps, num_stages=project.stages,
        )  # fmt: skip
        combine_kernel[grid](
            x, p, sums, first, last, n, x_width, vectors, per_split, product.row_stride,
            BLOCK_M=combine.block_m, BLOCK_N=combine.block_n, BLOCK_D=combine.block_d,
            PATCH=patch_constants(patches), STAGES=combine.stages,
            num_warps=combine.warps, num_stages=combine.stages,
        )  # fmt: skip
    return partial.flatten(0, 1)


def _reduce(partial: Tensor, out: Tensor, taps: int) -> None:
    size = out.numel()
    reduce_kernel[(triton.cdiv(size, REDUCE_BLOCK),)](
        partial, out, partial.shape[0], size, partial.shape[-1] // taps, taps, BLOCK=REDUCE_BLOCK
    )


def _with_a_unit_stride(w: Tensor) -> Tensor:
    return w if 1 in w.stride() else w.contiguous()
