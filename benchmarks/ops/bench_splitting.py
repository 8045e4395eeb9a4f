"""Products with all neurons' splitting matrices: `splitting_hvp` and `splitting_hvp_conv2d`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import growkernels as gk
from benchmarks import opponents
from benchmarks.case import OURS, Call, Case, Ceiling, Workload, while_torch_rounds
from benchmarks.table import Table

FAMILY = "splitting"
KERNELS = ("splitting", "wide_products", "convolution")
TABLE = Table(
    name=FAMILY,
    family=FAMILY,
    columns=(
        "case", "shape", "dtype", "growkernels", "of ceiling", "peak memory", "opponent",
        "speed-up", "opponent's memory", "machine",
    ),
)  # fmt: skip

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
_EAGER = "eager"
_TWO_KERNELS = "product with epilogue + product"
_COMPILED = "torch.compile"
_DOUBLE_BACKWARD = "double backward per neuron"
_FUNCTIONAL = "vmap of jvp of grad"

Calls = Callable[[Tensor, Tensor, Tensor], dict[str, Call]]


def _products(x: Tensor, w: Tensor, v: Tensor) -> dict[str, Call]:
    return {
        _EAGER: partial(opponents.splitting_hvp, x, w, v),
        _COMPILED: partial(opponents.compiled(opponents.splitting_hvp), x, w, v),
        OURS: partial(gk.splitting_hvp, x, w, v),
    }


def _products_on_a_gpu(x: Tensor, w: Tensor, v: Tensor) -> dict[str, Call]:
    return {**_products(x, w, v), _TWO_KERNELS: partial(opponents.splitting_hvp_projected, x, w, v)}


def _rounded_products(x: Tensor, w: Tensor, v: Tensor) -> dict[str, Call]:
    of_all = _products(x, w, v)
    return while_torch_rounds({name: of_all[name] for name in (_EAGER, OURS)})


def _convolutions(x: Tensor, w: Tensor, v: Tensor) -> dict[str, Call]:
    return {
        _EAGER: partial(opponents.splitting_hvp_conv2d, x, w, v),
        OURS: partial(gk.splitting_hvp_conv2d, x, w, v, padding=1),
    }


def _by_autograd(x: Tensor, w: Tensor, v: Tensor) -> dict[str, Call]:
    return {
        _DOUBLE_BACKWARD: partial(opponents.splitting_hvp_double_backward, x, w, v),
        _FUNCTIONAL: partial(opponents.splitting_hvp_functional, x, w, v),
        OURS: partial(gk.splitting_hvp, x, w, v),
    }


def _build(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, calls: Calls, device: torch.device
) -> Workload:
    """Normal x, w and v from a fixed seed; images are channels_last."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    x, w, v = map(draw, shapes)
    rows = w.numel() // w.shape[1]
    return Workload(
        calls(x, w, v),
        flops=4.0 * rows * v.numel(),
        bytes=sum(t.numel() * t.element_size() for t in (x, w, v, v)),
        tolerance=_TOLERANCE[torch.bfloat16 if calls is _rounded_products else dtype],
    )


def _case(
    name: str,
    shape: str,
    shapes: tuple[tuple[int, ...], ...],
    calls: Calls = _products,
    *,
    opponents: tuple[str, ...] = (_EAGER, _COMPILED),
    dtype: torch.dtype = torch.float32,
    ceiling: Ceiling | None = "gemm",
    seconds: float = 6.0,
) -> Case:
    return Case(
        name=name,
        shape=shape,
        dtype=dtype,
        layout="channels_last" if len(shapes[0]) == 4 else "contiguous",
        direction="product",
        opponents=opponents,
        build=partial(_build, shapes, dtype, calls),
        ceiling=ceiling,
        seconds=seconds,
    )


def _linear(
    rows: int,
    neurons: int,
    width: int,
    *,
    k: int = 1,
    dtype: torch.dtype = torch.float32,
    calls: Calls = _products,
    opponents: tuple[str, ...] = (_EAGER, _COMPILED),
    seconds: float = 6.0,
) -> Case:
    v = (neurons, width) if k == 1 else (neurons, k, width)
    shape = f"M={rows}, n={neurons}, d={width}" + (f", k={k}" if k > 1 else "")
    name = f"hvp {shape}, {str(dtype).removeprefix('torch.')}"
    shapes = ((rows, width), (rows, neurons), v)
    return _case(name, shape, shapes, calls, opponents=opponents, dtype=dtype, seconds=seconds)


def _conv(channels: int, size: int, images: int = 128, dtype: torch.dtype = torch.float32) -> Case:
    image = (images, channels, size, size)
    return _case(
        f"conv2d {channels} at {size}x{size}",
        f"{list(image)}, {channels} filters 3×3",
        (image, image, (channels, channels, 3, 3)),
        _convolutions,
        opponents=(_EAGER,),
        dtype=dtype,
    )


CASES = [
    _linear(6304, 1536, 384),  # DeiT-S' fc1 on 32 images
    _linear(6304, 1536, 384, k=4),
    _linear(6304, 1536, 384, dtype=torch.bfloat16),
    _linear(6304, 1536, 384, dtype=torch.float64),
    *(
        _linear(rows, neurons, width, seconds=4.0)
        for rows in (512, 6304, 25216)
        for neurons in (64, 768, 1536)
        for width in (64, 192, 384, 768)
        if (rows, neurons, width) != (6304, 1536, 384)
    ),
    *(
        _case(
            f"hvp M={rows}, n={neurons}, d={width}, float32 as bf16",
            f"M={rows}, n={neurons}, d={width}",
            ((rows, width), (rows, neurons), (neurons, width)),
            _rounded_products,
            opponents=(_EAGER,),
            ceiling=None,
        )
        for rows, neurons, width in ((6304, 1536, 384), (512, 768, 768), (6304, 64, 64))
    ),
    *(_conv(channels, size) for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4))),
    _case(
        "autograd",
        "M=512, n=16, d=64",
        ((512, 64), (512, 16), (16, 64)),
        _by_autograd,
        opponents=(_DOUBLE_BACKWARD, _FUNCTIONAL),
        ceiling=None,
    ),
]

_bf16 = partial(
    _linear,
    dtype=torch.bfloat16,
    calls=_products_on_a_gpu,
    opponents=(_EAGER, _COMPILED, _TWO_KERNELS),
)
GPU_CASES = [
    _bf16(50432, 1536, 384),  # DeiT-S' fc1 on 256 images
    _bf16(50432, 1536, 64),
    *(_conv(c, size, 512, torch.bfloat16) for c, size in ((64, 32), (128, 16), (256, 8))),
    _bf16(50432, 1536, 384, k=4),
    *(_bf16(50432, 1536, width) for width in (128, 192, 256)),
    _bf16(6304, 1536, 384),
    _linear(50432, 3072, 768, dtype=torch.bfloat16),  # too wide for the fused kernel
    _linear(50432, 1536, 64),
]


def bench_splitting(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
