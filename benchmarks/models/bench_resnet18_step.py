"""A training step of ResNet-18 with basis convolutions, against the same step with full kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import OURS, Case, Workload
from benchmarks.opponents import compiled, two_convolutions
from benchmarks.table import Table
from growkernels.experiments.models.resnet import resnet18
from growkernels.nn import BasisConv2d, convert

FAMILY = "resnet18_step"
KERNELS = ("basis_conv", "convolution")
TABLE = Table(
    name=FAMILY,
    family=FAMILY,
    columns=(
        "case", "shape", "dtype", "layout", "growkernels", "peak memory", "opponent", "speed-up",
        "opponent's time", "opponent's memory", "machine",
    ),
)  # fmt: skip

_DENSE = "eager dense"
_TWO = "eager conv, 1x1, cat"
_COMPILED = "compiled dense"
_PIXELS, _CLASSES = 32, 10
_FRACTION = 0.5


class _TwoConvolutions(BasisConv2d):
    """The same layer as its users would write it in plain PyTorch."""

    def forward(self, input: Tensor) -> Tensor:
        return two_convolutions(
            input,
            self.basis,
            self.coeff,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.include_basis,
        )


def _build(compile_it: bool, count: int, dtype: torch.dtype, device: torch.device) -> Workload:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, _PIXELS, _PIXELS, generator=generator)
    labels = torch.randint(_CLASSES, (count,), generator=generator).to(device)
    images = images.to(device, memory_format=torch.channels_last)
    basis = resnet18(_CLASSES, generator=generator)
    plan = {
        name: _FRACTION
        for name, module in basis.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and name != "conv1"
    }
    convert(basis, plan)
    basis.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # The full kernels are the basis convolutions' equivalents, so all variants compute the same.
    dense = copy.deepcopy(basis)
    convert(dense, dict.fromkeys(plan, 1.0))
    two = copy.deepcopy(basis)
    for module in two.modules():
        if isinstance(module, BasisConv2d):
            module.__class__ = _TwoConvolutions

    def training_step(model: nn.Module) -> Callable[[], list[Tensor]]:
        # So small a rate that the weights stay where the variants agree.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
        stem = model.get_parameter("conv1.weight")

        def loss_of_batch() -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            return functional.cross_entropy(logits.float(), labels)

        loss_function = compiled(loss_of_batch) if compile_it else loss_of_batch

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            loss = loss_function()
            loss.backward()
            optimizer.step()
            assert stem.grad is not None
            # The gradient has passed every layer. In 16 bits rounding decides so many signs in
            # front of the ReLUs that it differs by a third from one full kernel to another.
            return [loss, stem.grad] if dtype == torch.float32 else [loss]

        return step

    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(copy.deepcopy(basis)(images[:2]), labels[:2]).backward()
    flops = counter.get_total_flops() * count / 2
    weights = sum(p.numel() for p in basis.parameters())
    models: dict[str, nn.Module] = {OURS: basis}
    models |= {_COMPILED: dense} if compile_it else {_DENSE: dense, _TWO: two}
    steps = {name: training_step(model) for name, model in models.items()}
    # Weights are read by both passes and the update, gradients and momentum written and read.
    # Rounding decides some signs in front of the ReLUs, so gradients agree to some 0.1 % only.
    return Workload(steps, flops, 8 * 4.0 * weights, tolerance=2e-2)


def _cases(count: int, dtype: torch.dtype, suffix: str = "") -> list[Case]:
    return [
        Case(
            name=name + suffix,
            shape=f"{count} images [3, {_PIXELS}, {_PIXELS}], R = Cout/2 in 16 layers",
            dtype=dtype,
            layout="channels_last",
            direction="training step",
            opponents=opponents,
            build=partial(_build, compile_it, count, dtype),
        )
        for name, opponents, compile_it in (
            ("ResNet-18, eager", (_DENSE, _TWO), False),
            ("ResNet-18, torch.compile", (_COMPILED,), True),
        )
    ]


CASES = _cases(128, torch.float32)
# bfloat16 is autocast's: the weights stay in float32. Without instructions for it one of torch's
# convolutions takes seconds, and a step a minute.
if torch.ops.growkernels.bfloat16_tiles() != "none":
    CASES += _cases(128, torch.bfloat16, ", autocast")
GPU_CASES = _cases(512, torch.bfloat16)


def bench_resnet18_step(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
