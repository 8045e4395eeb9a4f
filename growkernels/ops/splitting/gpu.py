"""The family on CUDA tensors: Triton where it is worth it, else ATen's ops.

Registered from Python, so a CPU build of torch has it too; Triton is imported at its first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growkernels.ops.splitting.gpu_plan import (
    COMBINE,
    MOST_ROWS,
    PROJECT,
    Plan,
    generation,
    old_gpu,
    plan,
)

if TYPE_CHECKING:
    from growkernels.ops.splitting.triton_launch import Product

_library = torch.library.Library("growkernels", "IMPL")
# By name of the op: its composed form, and what checks the arguments and allocates the result.
_composed: dict[str, Any] = {}
_prepare: dict[str, Any] = {}


def register() -> None:
    """Puts this module's functions in front of what is registered for every device."""
    for op in (splitting_weight, splitting_hvp, splitting_hvp_conv2d):
        name = op.__name__
        _composed[name] = torch.library.get_kernel(f"growkernels::{name}", "CUDA")
        _prepare[name] = torch.library.get_kernel(f"growkernels::{name}", "Meta")
        _library.impl(name, op, "CUDA", with_keyset=True)


def splitting_weight(
    keys: Any, grad: Tensor, preact: Tensor, activation: str, beta: float | None
) -> Tensor:
    name, arguments = "splitting_weight", (grad, preact, activation, beta)
    out: Tensor = _prepare[name].call_boxed(keys, *arguments)
    if weight_obstacle(out.device, out.dtype):
        y: Tensor = _composed[name].call_boxed(keys, *arguments)
        return y
    if out.numel():
        from growkernels.ops.splitting import triton_launch

        with torch.cuda.device_of(out):
            triton_launch.splitting_weight(grad, preact, out, activation, beta)
    return out


def splitting_hvp(keys: Any, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    name = "splitting_hvp"
    out: Tensor = _prepare[name].call_boxed(keys, x, w, v)
    rows, width = x.shape
    if not rows or not out.numel():
        return out.zero_()
    chosen = plan_here(x, rows, width)
    if chosen.backend == "aten":
        y: Tensor = _composed[name].call_boxed(keys, x, w, v)
        return y
    from growkernels.ops.splitting import triton_launch

    return _run(triton_launch.linear_product(x, w, v), out, chosen)


def splitting_hvp_conv2d(keys: Any, x: Tensor, w: Tensor, v: Tensor, *sliding: list[int]) -> Tensor:
    name = "splitting_hvp_conv2d"
    out: Tensor = _prepare[name].call_boxed(keys, x, w, v, *sliding)
    if not w.numel() or not out.numel():
        return out.zero_()
    rows = w.numel() // w.shape[1]
    chosen = plan_here(x, rows, v.shape[-3:].numel(), patches=True)
    if chosen.backend == "aten":
        y: Tensor = _composed[name].call_boxed(keys, x, w, v, *sliding)
        return y
    from growkernels.ops.splitting import triton_launch

    return _run(triton_launch.patch_product(x, w, v, *sliding), out, chosen)


def wide_product(x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor] | None:
    """v [n, k, d] -> S v in float32, to some 2^-16 of |S| |v|, on the tensor cores of a GPU.

    x is [M, d] and w [M, n], of 16 or 32 bits. None where that cannot be had.
    """
    if x.dtype == torch.float64 or not x.is_cuda or not x.numel() or not w.numel():
        return None
    if triton_obstacle() or old_gpu(_capability(x.device)) or len(x) >= MOST_ROWS:
        return None
    from growkernels.ops.splitting.triton_launch import WideProduct

    tiles = generation(_capability(x.device))
    return WideProduct(x, w, PROJECT[tiles], COMBINE[tiles], _multiprocessors(x.device))


def weight_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why splitting_weight is composed of ATen's ops there; None where it is one kernel."""
    if dtype == torch.float64:
        return "it computes in float32"
    return triton_obstacle() or old_gpu(_capability(device))


def plan_here(x: Tensor, rows: int, width: int, *, patches: bool = False) -> Plan:
    """`gpu_plan.plan` for the GPU that `x` is on, with torch's settings."""
    if reason := triton_obstacle():
        return Plan("aten", (("fused", reason), ("projected", reason)))
    return plan(
        rows,
        width,
        x.dtype,
        capability=_capability(x.device),
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        patches=patches,
    )


@lru_cache
def triton_obstacle() -> str | None:
    """Why Triton cannot be used here, whatever the GPU."""
    return None if find_spec("triton") else "Triton is not installed"


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _run(product: Product, out: Tensor, chosen: Plan) -> Tensor:
    from growkernels.ops.splitting import triton_launch

    sms = _multiprocessors(out.device)
    with torch.cuda.device_of(out):
        if chosen.tile is not None:
            programs = sms * chosen.tile.per_sm
            triton_launch.fused(product, out, chosen.tile, chosen.precision, programs)
        else:
            tiles = generation(_capability(out.device))
            triton_launch.projected(product, out, PROJECT[tiles], COMBINE[tiles], sms)
    return out
