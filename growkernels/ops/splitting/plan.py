"""What computes the family's ops, and why.

On a GPU by Triton's kernels, which tiles they take included; elsewhere by what the compiled library
chooses. Triton is not imported here, so that the choice can be asked for anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from growkernels.ops.gpu_support import Gpu, gpu, triton_obstacle
from growkernels.ops.plan import Example, Plan, from_library, without_data
from growkernels.ops.splitting.triton_tiles import (
    COMBINE,
    FUSED,
    PROJECT,
    Tile,
    fused_tile,
    generation,
)

_ops = torch.ops.growkernels
_CUDA = torch.device("cuda")
# Samples are counted in 32 bits, with room for the last split's.
MOST_ROWS = 2**31 - 2**16


class Fused(NamedTuple):
    """Parameters of "fused"."""

    tile: Tile
    precision: str
    programs: int  # that run on the GPU at a time


class Projected(NamedTuple):
    """Parameters of "projected", and of products to 16 bits."""

    project: Tile
    combine: Tile
    multiprocessors: int


def plan_hvp(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    device: torch.device | None = None,
    *,
    full_precision: bool = False,
) -> Plan:
    """What computes `splitting_hvp` on a device (that of x, if None) under the present settings.

    The tensors need no data: see `without_data`. Raises what the op raises for shapes that do not
    fit.
    """
    device = device or x.device
    if device.type != "cuda":
        return from_library(_ops.splitting_hvp_plan(x, w, v, device, full_precision=full_precision))
    shapes = tuple(x.shape), tuple(w.shape), tuple(v.shape)
    return _hvp_on_gpu(*shapes, x.dtype, gpu(device), tf32_is_allowed() and not full_precision)


def plan_weight(preact: Tensor, device: torch.device | None = None) -> Plan:
    """What computes `splitting_weight`, as in `plan_hvp`."""
    device = device or preact.device
    if device.type != "cuda":
        return Plan("portable" if device.type == "cpu" else "aten")
    obstacle = triton_obstacle(gpu(device))
    if preact.dtype == torch.float64:
        obstacle = "it computes in float32"
    return Plan("aten", None, (("triton", obstacle),)) if obstacle else Plan("triton")


def plan_hvp_conv2d(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    device: torch.device | None = None,
) -> Plan:
    """What computes `splitting_hvp_conv2d`, as in `plan_hvp`."""
    device = device or x.device
    if device.type != "cuda":
        return from_library(
            _ops.splitting_hvp_conv2d_plan(x, w, v, stride, padding, dilation, device)
        )
    shapes = tuple(x.shape), tuple(w.shape), tuple(v.shape)
    sliding = tuple(stride), tuple(padding), tuple(dilation)
    return _hvp_conv2d_on_gpu(*shapes, *sliding, x.dtype, gpu(device), tf32_is_allowed())


def plan_wide_product(x: Tensor, w: Tensor, device: torch.device | None = None) -> Plan:
    """What computes S v to some 16 bits of x [M, d], w [M, n] and v: "projected" or nothing."""
    device = device or x.device
    if x.dtype == torch.float64:
        obstacle: str | None = "float64 asks for more bits"
    elif device.type != "cuda":
        obstacle = "it is for the tensor cores of a GPU"
    elif not x.numel() or not w.numel():
        obstacle = "there is nothing to sum"
    else:
        obstacle = _triton_obstacle(len(x), gpu(device))
    if obstacle:
        return Plan(None, None, (("projected", obstacle),))
    return Plan("projected", _projected(gpu(device)))


@lru_cache(maxsize=1024)
def plan_products(
    rows: int, width: int, dtype: torch.dtype, *, gpu: Gpu, tf32: bool, patches: bool = False
) -> Plan:
    """Which kernels compute y for `rows` samples of `width` columns, and why not the others.

    Args:
        rows, width: M and d; for convolutions the number of patches and their size.
        dtype: of the inputs.
        gpu: what computes it.
        tf32: whether float32 products may be rounded to TF32 (torch's setting for matrices).
        patches: whether the samples are patches of images.
    """
    obstacle = _triton_obstacle(rows, gpu)
    if dtype == torch.float64:
        obstacle = "float64 is left to the vendor's products"
    elif patches and dtype == torch.float32:
        obstacle = "float32 convolutions follow torch's own setting of TF32 for convolutions"
    if obstacle:
        return Plan("aten", None, (("fused", obstacle), ("projected", obstacle)))
    kind = "16 bit" if dtype.itemsize == 2 else "tf32" if tf32 else "ieee"
    tile = fused_tile(gpu.capability, kind, width)
    if tile is not None:
        precision = "tf32" if kind == "tf32" else "ieee"
        return Plan("fused", Fused(tile, precision, gpu.multiprocessors * tile.per_sm))
    widest = FUSED[generation(gpu.capability), kind][-1].width
    too_wide = ("fused", f"{width} columns do not fit into registers; {widest} do")
    if kind == "16 bit":
        return Plan("projected", _projected(gpu), (too_wide,))
    slower = ("projected", "the vendor's float32 products are faster than Triton's")
    return Plan("aten", None, (too_wide, slower))


def _triton_obstacle(rows: int, gpu: Gpu) -> str | None:
    if rows >= MOST_ROWS:
        return "the samples are counted in 32 bits"
    return triton_obstacle(gpu)


def _projected(gpu: Gpu) -> Projected:
    tiles = generation(gpu.capability)
    return Projected(PROJECT[tiles], COMBINE[tiles], gpu.multiprocessors)


def tf32_is_allowed() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


Shape = tuple[int, ...]


@lru_cache(maxsize=1024)
def _hvp_on_gpu(x: Shape, w: Shape, v: Shape, dtype: torch.dtype, gpu: Gpu, tf32: bool) -> Plan:
    _ops.splitting_hvp_plan(*(without_data(*s, dtype=dtype) for s in (x, w, v)), _CUDA)
    return plan_products(*x, dtype, gpu=gpu, tf32=tf32)


@lru_cache(maxsize=1024)
def _hvp_conv2d_on_gpu(
    x: Shape,
    w: Shape,
    v: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    dtype: torch.dtype,
    gpu: Gpu,
    tf32: bool,
) -> Plan:
    tensors = (without_data(*s, dtype=dtype) for s in (x, w, v))
    _ops.splitting_hvp_conv2d_plan(*tensors, stride, padding, dilation, _CUDA)
    rows, width = w[0] * w[2] * w[3], v[-3] * v[-2] * v[-1]
    return plan_products(rows, width, dtype, gpu=gpu, tf32=tf32, patches=True)


def _weights(device: torch.device, dtype: torch.dtype) -> Plan:
    return plan_weight(without_data(6304, 1536, dtype=dtype), device)


def _transformer_layer(device: torch.device, dtype: torch.dtype) -> Plan:
    """The first linear layer of DeiT-S, 32 images."""
    x, w, v = (
        without_data(*shape, dtype=dtype) for shape in ((6304, 384), (6304, 1536), (1536, 384))
    )
    return plan_hvp(x, w, v, device)


def _residual_layer(kernel: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """A convolution in the first stage of ResNet-18, 128 images."""
    shapes = (128, 64, 32, 32), (128, 64, 32, 32), (64, 64, kernel, kernel)
    x, w, v = (without_data(*shape, dtype=dtype) for shape in shapes)
    return plan_hvp_conv2d(x, w, v, [1, 1], [kernel // 2] * 2, [1, 1], device)


_TRITON = {"fused": ("cuda",), "projected": ("cuda",)}
_TILES = {"bfloat16 tiles": ("cpu",), "portable": ("cpu",), "aten": ()}
_CONVOLUTION = {**_TRITON, "winograd": ("cpu",), **_TILES}
EXAMPLES = {
    "splitting_weight": Example({"triton": ("cuda",), "portable": ("cpu",), "aten": ()}, _weights),
    "splitting_hvp": Example(
        {**_TRITON, "bfloat16 tiles": ("cpu",), "vendor's product": ("cpu",), **_TILES},
        _transformer_layer,
    ),
    "splitting_hvp_conv2d[3x3]": Example(_CONVOLUTION, partial(_residual_layer, 3)),
    "splitting_hvp_conv2d": Example(_CONVOLUTION, partial(_residual_layer, 5)),
}
