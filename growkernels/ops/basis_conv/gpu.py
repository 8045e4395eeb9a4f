"""The family on CUDA tensors, as `plan.py` says: with Triton's kernels, or composed of ATen's ops.

Both ways with kernels of ours, "triton" and "direct", share a backward pass: dz, dcoeff and dbias
in one pass of ours (or by the vendor's matrix products where the coefficients do not fit into one
program), then the vendor's convolutions with R channels for the gradients of x and of the basis.

Registered from Python, so a CPU build of torch has it too; Triton is imported at its first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from growkernels.ops.basis_conv.plan import Tiles, plan_basis_conv2d

if TYPE_CHECKING:
    from types import ModuleType

Pair = Sequence[int]
_ops = torch.ops.growkernels


def register() -> None:
    """Puts this module's functions in front of what is registered for every device."""
    for function in (
        basis_conv2d, basis_conv2d_with_maps, basis_conv2d_backward, basis_conv2d_algorithm
    ):  # fmt: skip
        torch.library.impl(f"growkernels::{function.__name__}", "CUDA", function)


def basis_conv2d(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    include_basis: bool,
) -> Tensor:
    form = (stride, padding, dilation)
    chosen = plan_basis_conv2d(x, basis, coeff, *form, include_basis)
    if chosen.parameters is None:
        y: Tensor = _ops.basis_conv2d_composed(x, basis, coeff, bias, *form, include_basis)
        return y
    y = _ops.basis_conv2d_outputs(x, basis, coeff, bias, *form, include_basis)
    forward(chosen.backend == "triton", chosen.parameters, x, basis, coeff, bias, form, y, None)
    return y


def basis_conv2d_with_maps(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    include_basis: bool,
) -> tuple[Tensor, Tensor]:
    form = (stride, padding, dilation)
    chosen = plan_basis_conv2d(x, basis, coeff, *form, include_basis)
    if chosen.parameters is None:
        y, z = _ops.basis_conv2d_with_maps_composed(x, basis, coeff, bias, *form, include_basis)
        return y, z
    y, z = _ops.basis_conv2d_with_maps_outputs(x, basis, coeff, bias, *form, include_basis)
    forward(chosen.backend == "triton", chosen.parameters, x, basis, coeff, bias, form, y, z)
    return y, z


def basis_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    z: Tensor,
    z_bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    include_basis: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    form = (stride, padding, dilation)
    tensors = (grad, x, basis, coeff, z, z_bias)
    chosen = plan_basis_conv2d(x, basis, coeff, *form, include_basis)
    if chosen.parameters is None:
        dx, dbasis, dcoeff, dbias = _ops.basis_conv2d_backward_composed(
            *tensors, *form, include_basis, wanted
        )
        return dx, dbasis, dcoeff, dbias
    sums = [False, False, wanted[2], wanted[3]]
    _, _, dcoeff, dbias = _ops.basis_conv2d_backward_outputs(*tensors, *form, include_basis, sums)
    return backward(chosen.parameters, *tensors, form, dcoeff, dbias, wanted[:2])


def basis_conv2d_algorithm(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    include_basis: bool,
) -> str:
    call = (x, basis, coeff, stride, padding, dilation, include_basis)
    _ops.basis_conv2d_plan(*call, x.device)  # checks more than the plan, which has shapes alone
    return str(plan_basis_conv2d(*call).backend)


def _launch() -> ModuleType:
    from growkernels.ops.basis_conv import triton_launch

    return triton_launch


def forward(
    fused: bool,
    tiles: Tiles,
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    form: Sequence[Pair],
    y: Tensor,
    z: Tensor | None,
) -> None:
    """Writes y, and the maps to z where it is given, by "triton" if `fused`, else by "direct".

    `form` is stride, padding and dilation. The outputs are contiguous or channels_last.
    """
    launch = _launch()
    y_rows = _channels_last(y)
    with torch.cuda.device_of(x):
        if fused:
            z_rows = None if z is None else _channels_last(z)
            launch.convolve(x, basis, coeff, bias, *form, y_rows, z_rows, tiles.forward)
        else:
            z_rows = torch.ops.aten.convolution(x, basis, None, *form, False, [0, 0], 1)
            launch.mix(z_rows, coeff, bias, y_rows, tiles.forward)
    if y_rows is not y:
        y.copy_(y_rows)
    if z is not None and z_rows is not None and z_rows is not z:
        z.copy_(z_rows)


def backward(
    tiles: Tiles,
    grad: Tensor,
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    z: Tensor,
    z_bias: Tensor | None,
    form: Sequence[Pair],
    dcoeff: Tensor | None,
    dbias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x and basis, as `wanted`, and dcoeff and dbias, written where given."""
    dz = torch.empty_like(z, memory_format=torch.channels_last) if any(wanted) else None
    sums = (grad, z, z_bias, coeff, dz, dcoeff, dbias)
    if tiles.backward is None:
        _matrix_products(*sums)
    else:
        with torch.cuda.device_of(x):
            _launch().coefficient_backward(*sums, tiles.multiprocessors, tiles.backward)
    dx = dbasis = None
    if dz is not None:
        dx, dbasis, _ = torch.ops.aten.convolution_backward(
            dz, x, basis, None, *form, False, [0, 0], 1, [*wanted, False]
        )
    return (
        None if dx is None else _laid_out(dx, suggest_memory_format(x)),
        None if dbasis is None else _laid_out(dbasis, suggest_memory_format(basis)),
        dcoeff,
        dbias,
    )


def _matrix_products(
    grad: Tensor,
    z: Tensor,
    z_bias: Tensor | None,
    coeff: Tensor,
    dz: Tensor | None,
    dcoeff: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """`coefficient_backward` by the vendor's matrix products, which read slices where they lie."""
    as_rows = _launch().as_rows
    combinations, filters = coeff.shape
    rows = as_rows(grad)
    rest = rows[:, -combinations:]
    if dz is not None:
        if rows.shape[1] > combinations:
            torch.addmm(rows[:, :filters], rest, coeff, out=as_rows(dz))
        else:
            torch.mm(rest, coeff, out=as_rows(dz))
    if dcoeff is not None:
        maps = as_rows(z)
        torch.mm(rest.t(), maps if z_bias is None else maps - z_bias, out=dcoeff)
    if dbias is not None:
        torch.sum(rows, 0, out=dbias)


def _channels_last(out: Tensor) -> Tensor:
    """The tensor itself, or a new one for its values."""
    if out.is_contiguous(memory_format=torch.channels_last):
        return out
    return torch.empty_like(out, memory_format=torch.channels_last)


def _laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor with the strides of a fresh one, also along dimensions of size 1."""
    _, channels, height, width = tensor.shape
    if memory_format == torch.channels_last:
        strides = (channels * height * width, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    if tensor.stride() == strides:
        return tensor
    return tensor.contiguous(memory_format=memory_format).as_strided(tensor.shape, strides)
