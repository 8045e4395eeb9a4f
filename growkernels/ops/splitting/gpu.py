"""The family on CUDA tensors, as `plan.py` says: by Triton's kernels, else composed of ATen's ops.

Registered from Python, so a CPU build of torch has it too; Triton is imported at its first use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from growkernels.ops.splitting.plan import (
    plan_hvp,
    plan_hvp_conv2d,
    plan_weight,
    plan_wide_product,
    tf32_is_allowed,
)

_ops = torch.ops.growkernels


def register() -> None:
    """Puts this module's functions in front of what is registered for every device."""
    for function in (splitting_weight, splitting_hvp, splitting_hvp_conv2d):
        torch.library.impl(f"growkernels::{function.__name__}", "CUDA", function)


def splitting_weight(grad: Tensor, preact: Tensor, activation: str, beta: float | None) -> Tensor:
    if plan_weight(preact).backend == "aten":
        y: Tensor = _ops.splitting_weight_composed(grad, preact, activation, beta)
        return y
    out: Tensor = _ops.splitting_weight_outputs(grad, preact, activation, beta)
    if out.numel():
        from growkernels.ops.splitting import triton_launch

        with torch.cuda.device_of(out):
            triton_launch.splitting_weight(grad, preact, out, activation, beta)
    return out


def splitting_hvp(x: Tensor, w: Tensor, v: Tensor, *, full_precision: bool = False) -> Tensor:
    if not w.numel() or not v.numel():
        zeros: Tensor = _ops.splitting_hvp_outputs(x, w, v).zero_()
        return zeros
    dtype = x.dtype
    chosen = plan_hvp(x, w, v, full_precision=full_precision)
    if chosen.backend == "aten":
        if full_precision and x.dtype == torch.float32 and tf32_is_allowed():
            x, w, v = x.double(), w.double(), v.double()
        y: Tensor = _ops.splitting_hvp_composed(x, w, v)
        return y.to(dtype)
    out: Tensor = _ops.splitting_hvp_outputs(x, w, v)
    from growkernels.ops.splitting import triton_launch

    with torch.cuda.device_of(out):
        launch = triton_launch.fused if chosen.backend == "fused" else triton_launch.projected
        launch(triton_launch.linear_product(x, w, v), out, *chosen.parameters)
    return out


def splitting_hvp_conv2d(
    x: Tensor, w: Tensor, v: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    if not w.numel() or not v.numel():
        zeros: Tensor = _ops.splitting_hvp_conv2d_outputs(x, w, v, stride, padding, dilation)
        return zeros.zero_()
    chosen = plan_hvp_conv2d(x, w, v, stride, padding, dilation)
    if chosen.backend == "aten":
        y: Tensor = _ops.splitting_hvp_conv2d_composed(x, w, v, stride, padding, dilation)
        return y
    out: Tensor = _ops.splitting_hvp_conv2d_outputs(x, w, v, stride, padding, dilation)
    from growkernels.ops.splitting import triton_launch

    with torch.cuda.device_of(out):
        launch = triton_launch.fused if chosen.backend == "fused" else triton_launch.projected
        product = triton_launch.patch_product(x, w, v, stride, padding, dilation)
        launch(product, out, *chosen.parameters)
    return out


def wide_product(x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor] | None:
    """v [n, k, d] -> S v in float32, to some 2^-16 of |S| |v|, on the tensor cores of a GPU.

    x is [M, d] and w [M, n], of 16 or 32 bits. None where that cannot be had.
    """
    chosen = plan_wide_product(x, w)
    if chosen.backend is None:
        return None
    from growkernels.ops.splitting import triton_launch

    return triton_launch.WideProduct(x, w, *chosen.parameters)
