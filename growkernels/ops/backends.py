"""Which backend every op uses for a device and dtype, and why not the others.

Each family lists its backends in order of preference. A backend states its obstacles: functions
that return a reason when it cannot be used, and None when nothing stands in the way. The kernels
ask the same questions where they dispatch; this table is what `growkernels info` shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from growkernels.ops import splitting
from growkernels.ops.gpu_support import cuda_obstacle, no_gpu, triton_obstacle

Obstacle = Callable[[torch.device, torch.dtype], str | None]


class Backend(NamedTuple):
    """One way to compute an op."""

    name: str
    obstacle: Obstacle


class Choice(NamedTuple):
    """The backend that would run (None: no backend can), and the ones refused before it."""

    backend: str | None
    refused: tuple[tuple[str, str], ...]


def _no_such_device(device: torch.device) -> str | None:
    return no_gpu() if device.type == "cuda" else None


def _not_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"the tensors are on {device.type}"


def _cuda_obstacle(family: str, elsewhere: dict[torch.dtype, str]) -> Obstacle:
    """`elsewhere`: dtypes that the kernels leave to others, with the reason."""

    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        return _not_cuda(device) or cuda_obstacle(family, device) or elsewhere.get(dtype)

    return obstacle


def _triton_weight_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _not_cuda(device) or triton_obstacle(device)
    return reason or splitting.gpu.weight_obstacle(device, dtype)


# Calls of the size that decides about speed: DeiT-S's first linear layer, and the first stage of
# ResNet-18.
_SPLITTING_ROWS = {"linear": (6304, 384), "patches": (128 * 32 * 32, 9 * 64)}


def _triton_product_obstacle(name: str, samples: str) -> Obstacle:
    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := _not_cuda(device) or triton_obstacle(device):
            return reason
        x = torch.empty(0, dtype=dtype, device=device)
        rows, width = _SPLITTING_ROWS[samples]
        plan = splitting.gpu.plan_here(x, rows, width, patches=samples == "patches")
        if plan.backend == name:
            return None
        return dict(plan.refused).get(name, f"{plan.backend!r} is chosen")

    return obstacle


DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The tiles that hold a dtype, best first: 16-bit values may be widened while they are packed.
_TILE_DTYPES = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float32,),
}


def _brgemm_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if dtype == torch.float64:
        return "oneDNN has no float64 tiles"
    if os.environ.get("GROWKERNELS_BRGEMM") == "0":
        return "GROWKERNELS_BRGEMM=0"
    if not any(map(torch.ops.growkernels.brgemm_available, _TILE_DTYPES[dtype])):
        return f"oneDNN in this torch has no tiles for {_name(dtype)} on this CPU"
    return None


def _transposed_brgemm_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _brgemm_obstacle(device, dtype)
    if reason is None and dtype != torch.bfloat16:
        return "from 16 columns on, loops that take the gradient as it lies are faster"
    return reason


def _cpu_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else f"the tensors are on {device.type}"


def _composed_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    return _no_such_device(device)


def _winograd_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if dtype != torch.float32:
        return f"it is for float32, not {_name(dtype)}"
    if torch.ops.growkernels.conv_algorithm() == "direct":
        return "set_conv_algorithm or GROWKERNELS_CONV_ALGORITHM asks for 'direct'"
    return None


_PORTABLE = Backend("portable", _cpu_obstacle)
_CPU_TILES = (Backend("brgemm", _brgemm_obstacle), _PORTABLE)
_COMPOSED = Backend("aten", _composed_obstacle)
_FLOAT64 = {torch.float64: "float64 is left to the vendor's products"}
_CONVOLUTIONS = dict.fromkeys(DTYPES, "the vendor's weight gradient of a convolution serves as is")
_VIRTUAL_GRAD = (
    Backend("cuda", _cuda_obstacle("virtual_grad", _FLOAT64)),
    Backend("brgemm", _transposed_brgemm_obstacle),
    _PORTABLE,
    _COMPOSED,
)
_WINOGRAD = Backend("winograd", _winograd_obstacle)
_VIRTUAL_GRAD_CONVOLUTIONS = (
    Backend("cuda", _cuda_obstacle("virtual_grad", _CONVOLUTIONS)),
    _WINOGRAD,
    _COMPOSED,
)


def _splitting_triton(samples: str) -> tuple[Backend, ...]:
    return tuple(
        Backend(name, _triton_product_obstacle(name, samples)) for name in ("fused", "projected")
    )


# Calls of the size that decides about speed: half of the filters of ResNet-18's second stage.
_BASIS_CONV_IMAGES = (128, 128, 16, 16)
_BASIS_CONV_FILTERS = 64


def _basis_conv_obstacle(name: str, kernel: int) -> Obstacle:
    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := _no_such_device(device):
            return reason
        if name == "triton" and (reason := _not_cuda(device) or triton_obstacle(device)):
            return reason
        if name == "winograd":
            if kernel != 3:
                return "it is for 3 x 3 kernels"
            if device.type != "cpu":
                return f"the tensors are on {device.type}"
            if dtype != torch.float32:
                return f"it is for float32, not {_name(dtype)}"
        if name == "pointwise" and kernel != 1:
            return "it is for 1 x 1 kernels"
        channels = _BASIS_CONV_IMAGES[1]
        images = torch.empty(
            _BASIS_CONV_IMAGES, dtype=dtype, device=device, memory_format=torch.channels_last
        )
        basis = images.new_empty(_BASIS_CONV_FILTERS, channels, kernel, kernel)
        coeff = images.new_empty(channels - _BASIS_CONV_FILTERS, _BASIS_CONV_FILTERS)
        ops, padding = torch.ops.growkernels, [kernel // 2] * 2
        chosen = ops.basis_conv2d_algorithm(images, basis, coeff, [1, 1], padding, [1, 1], True)
        if chosen == name:
            return None
        setting = ops.conv_algorithm()
        if setting == "direct" and name == "winograd":
            return "set_conv_algorithm or GROWKERNELS_CONV_ALGORITHM asks for 'direct'"
        return f"{chosen!r} is chosen for {_BASIS_CONV_FILTERS} filters on {_BASIS_CONV_IMAGES}"

    return obstacle


def _basis_conv_kinds(kernel: int) -> tuple[Backend, ...]:
    names = ("triton", "winograd", "pointwise", "direct", "reconstruct", "two convolutions")
    return tuple(Backend(name, _basis_conv_obstacle(name, kernel)) for name in names)


# Every op with its backends, the preferred one first; kinds of layers that fare otherwise apart.
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "virtual_grad_norms": _VIRTUAL_GRAD,
    "virtual_grads": _VIRTUAL_GRAD,
    "virtual_grad_norms[conv2d_relu]": _VIRTUAL_GRAD_CONVOLUTIONS,
    "virtual_grads[conv2d_relu]": _VIRTUAL_GRAD_CONVOLUTIONS,
    "basis_conv2d[3x3]": _basis_conv_kinds(3),
    "basis_conv2d[1x1]": _basis_conv_kinds(1),
    "splitting_weight": (Backend("triton", _triton_weight_obstacle), _PORTABLE, _COMPOSED),
    "splitting_hvp": (*_splitting_triton("linear"), *_CPU_TILES, _COMPOSED),
    "splitting_hvp_conv2d[3x3]": (
        *_splitting_triton("patches"),
        _WINOGRAD,
        *_CPU_TILES,
        _COMPOSED,
    ),
    "splitting_hvp_conv2d": (*_splitting_triton("patches"), *_CPU_TILES, _COMPOSED),
    "symmetric_eigs": (Backend("cuda", _cuda_obstacle("eigen", {})), _PORTABLE, _COMPOSED),
}


def choose_backend(op: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The backend that `op` uses for tensors of `dtype` on `device`, and why not those before it.

    Raises ValueError for an op that is not in the table, TypeError for a dtype no op takes.
    """
    if op not in BACKENDS:
        raise ValueError(f"{op!r} is not an op of growkernels; choose from {', '.join(BACKENDS)}")
    if dtype not in DTYPES:
        raise TypeError(f"{op} takes {', '.join(map(_name, DTYPES))}, not {_name(dtype)}")
    device = torch.device(device)
    refused: list[tuple[str, str]] = []
    for backend in BACKENDS[op]:
        reason = backend.obstacle(device, dtype)
        if reason is None:
            return Choice(backend.name, tuple(refused))
        refused.append((backend.name, reason))
    return Choice(None, tuple(refused))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
