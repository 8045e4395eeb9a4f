"""Basis convolutions: `basis_conv2d`, forward alone and with the gradients of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import growkernels as gk
from benchmarks import opponents
from benchmarks.case import OURS, Call, Case, Workload
from benchmarks.table import Table

FAMILY = "basis_conv"
KERNELS = ("basis_conv", "convolution")
TABLE = Table(
    name=FAMILY,
    family=FAMILY,
    columns=(
        "case", "shape", "dtype", "layout", "direction", "growkernels", "of ceiling", "peak memory",
        "opponent", "speed-up", "opponent's memory", "machine",
    ),
)  # fmt: skip

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_DENSE = "eager dense"
# What our algorithm brings without the basis: a convolution whose filters are all of the basis.
_OURS_DENSE = "ours, dense"
_TWO = "eager conv, 1x1, cat"
_COMPILED = "torch.compile conv, 1x1, cat"
_RECONSTRUCTED = "eager reconstructed kernel"
_COMPILED_RECONSTRUCTED = "torch.compile reconstructed kernel"
_ALL = (_DENSE, _OURS_DENSE, _TWO, _COMPILED, _RECONSTRUCTED)
_EAGER = (_DENSE, _OURS_DENSE, _TWO, _RECONSTRUCTED)
_GPU = (_DENSE, _TWO, _COMPILED, _RECONSTRUCTED, _COMPILED_RECONSTRUCTED)

_FORWARD = "forward"
_TRAINING = "forward + backward"

Layer = Callable[..., Tensor]


def _training_step(layer: Layer, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    y = layer(*leaves)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def _uncompared(call: Callable[[], object]) -> None:
    """A dense layer's gradients are those of another kernel."""
    call()


def _build(
    image: tuple[int, int, int, int], filters: int, outputs: int, kernel: int, stride: int,
    dtype: torch.dtype, layout: str, direction: str, variants: tuple[str, ...],
    device: torch.device,
) -> Workload:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    taps = image[1] * kernel * kernel
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        tensor = torch.randn(size, generator=generator).mul_(scale).to(device, dtype)
        return tensor.contiguous(memory_format=memory_format) if len(size) == 4 else tensor

    x = draw(*image)
    basis = draw(filters, image[1], kernel, kernel, scale=taps**-0.5)
    coeff = draw(outputs - filters, filters, scale=filters**-0.5)
    mixed = (coeff @ basis.flatten(1)).view(-1, *basis.shape[1:])
    whole = torch.cat([basis, mixed]).contiguous(memory_format=memory_format)
    options: dict[str, Any] = {"stride": stride, "padding": kernel // 2}
    y = functional.conv2d(x, whole, None, **options)
    positions = y.numel() // outputs
    training = direction == _TRAINING
    # The gradients of x and of the parameters cost as much as the forward pass, each.
    flops = 2.0 * positions * filters * (taps + outputs - filters) * (3 if training else 1)
    traffic = (x.numel() + y.numel()) * x.element_size() * (3 if training else 1)
    nothing_mixed = coeff.new_empty(0, outputs)
    layers: dict[str, tuple[Layer, tuple[Tensor, ...]]] = {
        _DENSE: (partial(functional.conv2d, **options), (x, whole)),
        _OURS_DENSE: (partial(gk.basis_conv2d, **options), (x, whole, nothing_mixed)),
        _TWO: (partial(opponents.two_convolutions, **options), (x, basis, coeff)),
        _COMPILED: (
            opponents.compiled(partial(opponents.two_convolutions, **options)), (x, basis, coeff),
        ),
        _RECONSTRUCTED: (partial(opponents.reconstructed, **options), (x, basis, coeff)),
        _COMPILED_RECONSTRUCTED: (
            opponents.compiled(partial(opponents.reconstructed, **options)), (x, basis, coeff),
        ),
        OURS: (partial(gk.basis_conv2d, **options), (x, basis, coeff)),
    }  # fmt: skip
    grad = torch.randn(y.shape, generator=generator).to(device, dtype)
    grad = grad.contiguous(memory_format=memory_format)
    calls: dict[str, Call] = {}
    for name in variants:
        layer, tensors = layers[name]
        if not training:
            calls[name] = partial(layer, *tensors)
            continue
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        calls[name] = partial(_training_step, layer, leaves, grad)
    for name in {_DENSE, _OURS_DENSE} & set(calls) if training else ():
        calls[name] = partial(_uncompared, calls[name])
    tf32 = dtype == torch.float32 and device.type == "cuda"
    return Workload(calls, flops, traffic, 1e-2 if tf32 else _TOLERANCE[dtype])


def _case(
    name: str,
    image: tuple[int, int, int, int],
    filters: int,
    direction: str,
    *,
    outputs: int | None = None,
    kernel: int = 3,
    stride: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    against: tuple[str, ...] = _EAGER,
    seconds: float | None = 5.0,
) -> Case:
    outputs = outputs or image[1]
    steps = f", stride {stride}" if stride > 1 else ""
    return Case(
        name=f"{name}, {direction}",
        shape=f"{list(image)} -> {outputs}, {kernel}x{kernel}{steps}, R = {filters}",
        dtype=dtype,
        layout=layout,
        direction=direction,
        opponents=against,
        build=partial(
            _build, image, filters, outputs, kernel, stride, dtype, layout, direction,
            (*against, OURS),
        ),
        ceiling="gemm",
        seconds=seconds,
    )  # fmt: skip


# The 3x3 convolutions of ResNet-18's four stages on CIFAR, where half of the filters are a basis.
_STAGES = {64: 32, 128: 16, 256: 8, 512: 4}
_STAGE_2 = (128, 128, 16, 16)

CASES = [
    *(
        _case(
            f"stage {stage}", (128, channels, size, size), channels // 2, direction,
            against=_ALL, seconds=8.0,
        )
        for direction in (_FORWARD, _TRAINING)
        for stage, (channels, size) in enumerate(_STAGES.items(), 1)
    ),
    *(
        _case(f"R/Cout = {numerator}/8", _STAGE_2, 16 * numerator, _TRAINING)
        for numerator in (1, 2, 6)
    ),
    _case("batch 1", (1, 128, 16, 16), 64, _FORWARD, seconds=3.0),
    _case("batch 16", (16, 128, 16, 16), 64, _TRAINING, seconds=3.0),
    _case("stride 2", (128, 64, 32, 32), 64, _TRAINING, outputs=128, stride=2),
    _case("1x1", (128, 128, 16, 16), 64, _TRAINING, outputs=256, kernel=1),
    _case("5x5", _STAGE_2, 64, _TRAINING, kernel=5, seconds=8.0),
    _case("contiguous", _STAGE_2, 64, _TRAINING, layout="contiguous"),
    _case("bfloat16", _STAGE_2, 64, _TRAINING, dtype=torch.bfloat16),
]  # fmt: skip


def _gpu_case(name: str, image: tuple[int, int, int, int], filters: int, direction: str,
              against: tuple[str, ...] = _GPU, **options: Any) -> Case:  # fmt: skip
    options = {"dtype": torch.bfloat16, "seconds": None, **options}
    return _case(name, image, filters, direction, against=against, **options)


GPU_CASES = [
    *(
        _gpu_case(f"stage {stage}", (512, channels, size, size), channels // 2, direction)
        for direction in (_FORWARD, _TRAINING)
        for stage, (channels, size) in enumerate(_STAGES.items(), 1)
    ),
    *(
        _gpu_case(
            f"stage {stage}, 128 images", (128, channels, size, size), channels // 2, direction
        )
        for direction in (_FORWARD, _TRAINING)
        for stage, (channels, size) in list(enumerate(_STAGES.items(), 1))[:2]
    ),
    *(
        _gpu_case(f"R/Cout = {n}/8", (512, 128, 16, 16), 16 * n, _TRAINING, _EAGER)
        for n in (1, 2, 6)
    ),
    _gpu_case("stride 2", (512, 64, 32, 32), 64, _TRAINING, _EAGER, outputs=128, stride=2),
    _gpu_case("float16", (512, 128, 16, 16), 64, _TRAINING, _EAGER, dtype=torch.float16),
    _gpu_case("float32", (512, 128, 16, 16), 64, _TRAINING, _EAGER, dtype=torch.float32),
    _gpu_case("contiguous", (512, 128, 16, 16), 64, _TRAINING, _EAGER, layout="contiguous"),
]


def bench_basis_conv(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
