"""What computes basis_conv2d and its backward pass, and why. On a GPU that is one of

    triton            our convolution that mixes its maps while they are in registers
    direct            the vendor's convolution for the maps, our one pass for the combinations
    two convolutions  the vendor's convolutions for both, composed of ATen's ops
    reconstruct       one vendor's convolution with the full kernel, composed of ATen's ops

and elsewhere what the compiled library chooses: on the CPU, besides the last three,

    tiles             our direct convolution of bfloat16, mixed while it is in cache
    winograd          our F(4x4, 3x3) of float32, mixed likewise
    pointwise         our products for a 1 x 1 kernel and the mix, float32

and the vendor's for float64. 16-bit images without tiles are widened to float32. Triton is not
imported here, so that the choice can be asked for anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growkernels.ops.basis_conv.triton_tiles import (
    BackwardTile,
    ForwardTile,
    backward_tile,
    forward_tile,
    most_filters,
)
from growkernels.ops.gpu_support import Gpu, gpu, triton_obstacle
from growkernels.ops.plan import Example, Plan, from_library, without_data

_ops = torch.ops.growkernels
_CUDA = torch.device("cuda")
Pair = tuple[int, int]
Images = tuple[int, int, int, int]

# Fusing saves traffic of some Cout values per position, against sums over Cin kh kw products. On an
# H100 the traffic matters in ResNet's first two stages; beyond, the vendor's convolution is faster
# by more than that (a prediction from bytes and operations).
_LONGEST_SUM = 9 * 128
_FEWEST_PROGRAMS = 0.75  # of the multiprocessors
_POSITIONS = 64  # of a program where there are few
_MOST_POSITIONS = 2**31 - 2**16  # they are counted in 32 bits, with room for the last program's


class Tiles(NamedTuple):
    """Parameters of "triton" and of "direct"."""

    forward: ForwardTile
    backward: BackwardTile | None  # None: the vendor's matrix products
    multiprocessors: int


def plan_basis_conv2d(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    include_basis: bool,
    device: torch.device | None = None,
) -> Plan:
    """What computes a call on a device (that of x, if None) under the present settings.

    Forward and backward are computed alike, but for training without `include_basis`, which needs
    the maps: where "reconstruct" is chosen, two convolutions make them.

    The tensors need no data: see `without_data`. Raises what the op raises for shapes that do not
    fit.
    """
    device = device or x.device
    if device.type != "cuda":
        choice = _ops.basis_conv2d_plan(
            x, basis, coeff, stride, padding, dilation, include_basis, device
        )
        return from_library(choice)
    return plan_on_gpu(
        tuple(x.shape),
        tuple(basis.shape),
        tuple(coeff.shape),
        x.dtype,
        gpu(device),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        include_basis,
        _tf32(),
    )


def _tf32() -> bool:
    precisions: Any = torch.backends.cudnn
    return bool(precisions.conv.fp32_precision == "tf32")


@lru_cache(maxsize=1024)
def plan_on_gpu(
    x: Images,
    basis: Images,
    coeff: Pair,
    dtype: torch.dtype,
    gpu: Gpu,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    include_basis: bool = True,
    tf32: bool = True,
) -> Plan:
    """What computes calls with tensors of these shapes on a GPU.

    `tf32` says whether convolutions may round float32 to TF32.
    """
    tensors = (without_data(*shape, dtype=dtype) for shape in (x, basis, coeff))
    composed = from_library(
        _ops.basis_conv2d_plan(*tensors, stride, padding, dilation, include_basis, _CUDA)
    )
    filters, mixed = basis[0], coeff[0]
    outputs = mixed + (filters if include_basis else 0)
    height, width = (
        (x[2 + i] + 2 * padding[i] - dilation[i] * (basis[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    positions = x[0] * height * width
    obstacle = _obstacle(filters, mixed, positions, dtype, gpu, tf32)
    if composed.backend == "reconstruct":
        obstacle = (
            f"{filters} of {outputs} filters are so many that one convolution with the full "
            "kernel takes fewer operations"
        )
    if obstacle:
        ours = (("triton", obstacle), ("direct", obstacle))
        return composed._replace(refused=ours + composed.refused)
    back = backward_tile(filters, mixed, dtype)
    loss = _loss_by_fusing(filters, outputs, prod(basis[1:]), positions, gpu)
    by_rows = (basis[3], *stride, padding[1], dilation[1]) == (3, 1, 1, 1, 1)
    row = width if by_rows and not loss else None
    forward = forward_tile(filters, positions, dtype, gpu.multiprocessors, row)
    tiles = Tiles(forward, back, gpu.multiprocessors)
    return Plan("direct", tiles, (("triton", loss),)) if loss else Plan("triton", tiles)


def _obstacle(
    filters: int, mixed: int, positions: int, dtype: torch.dtype, gpu: Gpu, tf32: bool
) -> str | None:
    """Why neither "triton" nor "direct" can compute a call."""
    if mixed == 0:
        return "there is nothing to mix"
    if positions == 0:
        return "there are no images"
    if dtype == torch.float64:
        return "our kernels are for 16-bit types and float32, not float64"
    if dtype == torch.float32 and not tf32:
        return (
            "TF32 is off for convolutions (torch.backends.cudnn.allow_tf32), and our kernels have "
            "no other float32"
        )
    if reason := triton_obstacle(gpu):
        return reason
    if positions > _MOST_POSITIONS:
        return f"{positions} positions are more than our kernels count"
    most = most_filters(dtype, gpu.shared_bytes)
    if filters > most:
        return f"{filters} filters do not fit into one program, {most} do"
    return None


def _loss_by_fusing(filters: int, outputs: int, taps: int, positions: int, gpu: Gpu) -> str | None:
    """Why "direct" is faster than "triton"."""
    if taps > _LONGEST_SUM:
        return (
            f"sums over {taps} products take so long that the vendor's faster convolution saves "
            "more than fusing it with the mix"
        )
    programs = -(-positions // _POSITIONS)
    if programs < _FEWEST_PROGRAMS * gpu.multiprocessors:
        return (
            f"{positions} positions make {programs} programs, too few for "
            f"{gpu.multiprocessors} multiprocessors"
        )
    room = max(16, 1 << (filters - 1).bit_length())
    if 4 * filters < 3 * room:
        return f"{filters} filters leave more than a quarter of {room} columns empty"
    if 10 * room >= 9 * outputs:
        return f"{filters} of {outputs} filters leave our convolution too little to save"
    return None


def _residual_layer(kernel: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """Half of the filters in the second stage of ResNet-18, 128 images."""
    return plan_basis_conv2d(
        without_data(128, 128, 16, 16, dtype=dtype, channels_last=True),
        without_data(64, 128, kernel, kernel, dtype=dtype),
        without_data(64, 64, dtype=dtype),
        [1, 1],
        [kernel // 2] * 2,
        [1, 1],
        True,
        device,
    )


_BACKENDS = {
    "triton": ("cuda",),
    "tiles": ("cpu",),
    "winograd": ("cpu",),
    "pointwise": ("cpu",),
    "direct": ("cpu", "cuda"),
    "reconstruct": (),
    "two convolutions": (),
}
EXAMPLES = {
    f"basis_conv2d[{kernel}x{kernel}]": Example(_BACKENDS, partial(_residual_layer, kernel))
    for kernel in (3, 1)
}
