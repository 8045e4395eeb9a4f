"""Gradients of virtual layers: `virtual_grad_norms` and `virtual_grads`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import growkernels as gk
from benchmarks import opponents
from benchmarks.case import OURS, Call, Case, Ceiling, Workload, while_torch_rounds
from benchmarks.table import Table
from growkernels.experiments.models.batched import RESIDUAL_SCALE

FAMILY = "virtual_grad"
KERNELS = ("virtual_grad", "wide_products", "convolution")
TABLE = Table(
    name=FAMILY,
    family=FAMILY,
    columns=(
        "case", "shape", "dtype", "layout", "growkernels", "of ceiling", "peak memory", "opponent",
        "speed-up", "opponent's memory", "machine",
    ),
)  # fmt: skip


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
_EAGER = "eager loop"
_COMPILED = "torch.compile"

# Every workload below takes the positions' inputs and gradients and returns the variants' calls.
Positions = list[Tensor]
Calls = Callable[[Positions, Positions], dict[str, Call]]


def _linear_relu_norms(hs: Positions, gs: Positions) -> dict[str, Call]:
    loop = opponents.linear_relu_norms
    return {
        _EAGER: partial(loop, hs, gs),
        _COMPILED: partial(opponents.compiled(loop), hs, gs),
        OURS: partial(gk.virtual_grad_norms, hs, gs, "linear_relu"),
    }


def _linear_relu_gradients(hs: Positions, gs: Positions) -> dict[str, Call]:
    loop = opponents.linear_relu_gradients
    return {
        _EAGER: partial(loop, hs, gs),
        _COMPILED: partial(opponents.compiled(loop), hs, gs),
        OURS: partial(gk.virtual_grads, hs, gs, "linear_relu"),
    }


def _accumulate(
    layer: str, loop: Callable[..., Tensor], hs: Positions, gs: Positions
) -> dict[str, Call]:
    dtype = torch.promote_types(hs[0].dtype, torch.float32)

    def state() -> tuple[list[Tensor], Tensor]:
        buffers = [
            h.new_zeros(g.shape[1], h.shape[1], dtype=dtype) for h, g in zip(hs, gs, strict=True)
        ]
        return buffers, hs[0].new_zeros(len(hs), dtype=dtype)

    theirs, compiled, (buffers, moments) = state(), state(), state()
    return {
        _EAGER: partial(loop, hs, gs, *theirs),
        _COMPILED: partial(opponents.compiled(loop), hs, gs, *compiled),
        OURS: partial(gk.virtual_grad_norms, hs, gs, layer, buffers, second_moments=moments),
    }


_linear_relu_accumulate = partial(_accumulate, "linear_relu", opponents.linear_relu_accumulate)
_linear_accumulate = partial(_accumulate, "linear", opponents.linear_accumulate)


def _linear_norms(hs: Positions, gs: Positions) -> dict[str, Call]:
    loop = opponents.linear_norms
    return {
        _EAGER: partial(loop, hs, gs),
        _COMPILED: partial(opponents.compiled(loop), hs, gs),
        OURS: partial(gk.virtual_grad_norms, hs, gs, "linear"),
    }


def _residual_tanh_norms(hs: Positions, gs: Positions) -> dict[str, Call]:
    loop = partial(opponents.residual_tanh_norms, scale=RESIDUAL_SCALE)
    ours = partial(gk.virtual_grad_norms, layer="residual", activation="tanh", scale=RESIDUAL_SCALE)
    return {
        _EAGER: partial(loop, hs, gs),
        _COMPILED: partial(opponents.compiled(loop), hs, gs),
        OURS: partial(ours, hs, gs),
    }


def _rounded(calls: Calls, hs: Positions, gs: Positions) -> dict[str, Call]:
    """The eager loop and ours."""
    of_all = calls(hs, gs)
    return while_torch_rounds({name: of_all[name] for name in (_EAGER, OURS)})


def _conv2d_relu_norms(hs: Positions, gs: Positions) -> dict[str, Call]:
    return {
        "conv2d_weight": partial(opponents.conv2d_relu_norms, hs, gs),
        "autograd": partial(opponents.conv2d_relu_norms_autograd, hs, gs),
        OURS: partial(gk.virtual_grad_norms, hs, gs, "conv2d_relu"),
    }


def _build(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, layout: str, calls: Calls,
    outputs: int | None, tolerance: float | None, device: torch.device,
) -> Workload:  # fmt: skip
    """Normal activations (half of them masked by the ReLU) and gradients, from a fixed seed.

    The gradients have the shapes of the activations, or as many features as `outputs`.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(shapes: Sequence[tuple[int, ...]]) -> Positions:
        tensors = [
            torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes
        ]
        if layout == "channels_last":
            return [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
        return tensors

    of_grads = shapes if outputs is None else [(*shape[:-1], outputs) for shape in shapes]
    hs, gs = draw(shapes), draw(of_grads)
    # G is [C, C] per row, or [C, C, 3, 3] per pixel.
    taps = 9 if hs[0].dim() == 4 else 1
    flops = sum(2.0 * taps * h.numel() * g.shape[1] for h, g in zip(hs, gs, strict=True))
    read = sum(tensor.numel() * tensor.element_size() for tensor in (*hs, *gs))
    return Workload(calls(hs, gs), flops, read, tolerance or _TOLERANCE[dtype])


def _case(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    calls: Calls,
    *,
    opponents: tuple[str, ...] = (_EAGER, _COMPILED),
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    direction: str = "norms",
    ceiling: Ceiling | None = "gemm",
    outputs: int | None = None,
    tolerance: float | None = None,
) -> Case:
    counts = {shape: shapes.count(shape) for shape in shapes}
    return Case(
        name=name,
        shape=" + ".join(f"{count} × {list(shape)}" for shape, count in counts.items())
        + (f" → {outputs}" if outputs else ""),
        dtype=dtype,
        layout=layout,
        direction=direction,
        opponents=opponents,
        build=partial(_build, shapes, dtype, layout, calls, outputs, tolerance),
        ceiling=ceiling,
    )


_DEIT_S: Sequence[tuple[int, ...]] = [(6304, 384)] * 12  # 12 blocks, 32 images x 197 tokens
_SPIRALS: Sequence[tuple[int, ...]] = [
    (450, 5)
] * 6  # SensLI's training set; launch overhead dominates
_RAGGED: Sequence[tuple[int, ...]] = [(6304, width) for width in (192, 384, 768)] * 2
_CONVOLUTIONS: Sequence[tuple[int, ...]] = [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8)]

CASES = [
    _case("linear_relu", _DEIT_S, _linear_relu_norms),
    _case("linear_relu bfloat16", _DEIT_S, _linear_relu_norms, dtype=torch.bfloat16),
    _case("linear_relu float64", _DEIT_S, _linear_relu_norms, dtype=torch.float64),
    _case("linear_relu ragged", _RAGGED, _linear_relu_norms),
    _case(
        "linear_relu accumulate", _DEIT_S, _linear_relu_accumulate,
        direction="norms of sums, second moments",
    ),
    _case("linear_relu gradients", _DEIT_S, _linear_relu_gradients, direction="gradients"),
    _case("residual tanh", _DEIT_S, _residual_tanh_norms),
    _case("linear", _DEIT_S, _linear_norms, outputs=1536),
    _case("linear bfloat16", _DEIT_S, _linear_norms, outputs=1536, dtype=torch.bfloat16),
    _case(
        "linear accumulate", _DEIT_S, _linear_accumulate, outputs=1536,
        direction="norms of sums, second moments",
    ),
    *(
        _case(
            f"{layer} float32 as bf16", _DEIT_S, partial(_rounded, calls), opponents=(_EAGER,),
            ceiling=None, outputs=outputs, tolerance=3e-2,
        )
        for layer, calls, outputs in (
            ("linear_relu", _linear_relu_norms, None), ("linear", _linear_norms, 1536)
        )
    ),
    *(
        _case(
            f"linear_relu small {str(dtype).removeprefix('torch.')}", _SPIRALS, _linear_relu_norms,
            dtype=dtype, ceiling=None,
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ),
    *(
        _case(
            f"conv2d_relu {shape[1]} at {shape[2]}x{shape[3]} {layout}", [shape],
            _conv2d_relu_norms, opponents=("conv2d_weight", "autograd"), layout=layout,
        )
        for shape in _CONVOLUTIONS
        for layout in ("channels_last", "contiguous")
    ),
]  # fmt: skip

# DeiT-S at a batch for one GPU, 256 images x 197 tokens: before the 12 blocks and after each.
_DEIT_S_BATCH: Sequence[tuple[int, ...]] = [(50432, 384)] * 13
_WIDE: Sequence[tuple[int, ...]] = [(8192, width) for width in (768, 1024, 512)] * 2

GPU_CASES = [
    _case("linear_relu", _DEIT_S_BATCH, _linear_relu_norms, dtype=torch.bfloat16),
    *(
        _case(
            f"linear_relu small {str(dtype).removeprefix('torch.')}", _SPIRALS, _linear_relu_norms,
            dtype=dtype, ceiling=None,
        )
        for dtype in (torch.bfloat16, torch.float32)
    ),
    _case("residual tanh", _DEIT_S_BATCH, _residual_tanh_norms, dtype=torch.bfloat16),
    _case(
        "linear_relu accumulate", _DEIT_S_BATCH, _linear_relu_accumulate, dtype=torch.bfloat16,
        direction="norms of sums, second moments",
    ),
    _case("linear_relu wide", _WIDE, _linear_relu_norms, dtype=torch.bfloat16),
    _case("linear_relu float32", _DEIT_S, _linear_relu_norms),
    _case("linear", _DEIT_S_BATCH, _linear_norms, outputs=1536, dtype=torch.bfloat16),
]  # fmt: skip


def bench_virtual_grad(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
