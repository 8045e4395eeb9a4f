"""`python -m benchmarks.winograd_accuracy`: what Winograd's transforms cost in digits.

Every case is computed in float32 by the Winograd kernels, by our direct ones and by torch's own
convolution, and compared with float64. `--write` stores the table in docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import growkernels as gk
from benchmarks import markdown
from growkernels.info import cpu_model

_DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
_HEADING = ("images", "channels", "result", "Winograd", "direct", "torch", "Winograd, normwise")

_TEXT = """# Accuracy of the Winograd kernels

Written by `make accuracy`; measured on {machine}, torch {torch}.

Three columns show the largest error over the largest value of the result, in float32 against
float64. The last one divides Winograd's largest error by the largest value that the result could
have had: the same convolution (for gradients, the same sum) of absolute values.

{table}

* The bound to rely on is normwise, the last column: below 3e-6 for every input here. A Winograd
  tile mixes 36 pixels, so its error is small beside the largest of them, not beside each result.
* Where nothing cancels, the error is below 3e-6 of the largest value of the result, for any number
  of channels: up to 2.5 times torch's for outputs and for the gradient of x, up to 5 times for the
  gradient of the kernel. From 256 channels on the output's is no larger than torch's, because
  channels are summed in runs of 128.
* Where results are small beside what they are sums of, as second differences of a ramp are,
  relative errors are larger, and so are torch's own. One pixel of 1e6 among pixels of order 1 costs
  the results of its tile their digits even where the kernel does not reach it.
* `gk.set_conv_algorithm("direct")` sums as the definition says, with at most twice torch's error.

The interpolation points are 0, ±2/3, ±3/2 and infinity. Of the pairs tried in an emulation (64
channels, normal data, root mean square error over a direct sum's) they are among the best: 1.8
times; ±5/8 with ±3/2 1.8, ±7/10 with ±7/5 1.9, ±3/4 with ±3/2 1.9, ±3/4 with ±5/4 2.4, ±1/2 with
±2 2.5, ±1 with ±2 4.0, ±5/6 with ±7/6 4.2.
"""


@dataclass(frozen=True)
class Layer:
    """A named input of a 3 x 3 basis convolution, float32."""

    name: str
    x: Tensor
    basis: Tensor
    padding: int = 1


def _layers() -> Iterator[Layer]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for channels in (16, 64, 256, 1024, 4096):
        filters = min(channels // 2, 64)
        basis = normal(filters, channels, 3, 3) / (9 * channels) ** 0.5
        yield Layer("normal", normal(2, channels, 16, 16), basis)
    basis = normal(32, 64, 3, 3) / 24
    yield Layer("normal, above 0 only", normal(2, 64, 16, 16).relu(), basis)
    ramp = torch.arange(16.0).expand(2, 16, 16, 16) * 100 + normal(2, 16, 1, 1)
    second_difference = torch.zeros(8, 16, 3, 3)
    second_difference[:, :, 1] = torch.tensor([1.0, -2.0, 1.0]) * (1 + normal(8, 16, 1).abs())
    yield Layer("ramp, second differences", ramp + normal(2, 16, 16, 16), second_difference, 0)
    pixel = normal(2, 64, 16, 16)
    pixel[:, :, 5, 5] = 1e6
    yield Layer("normal, one pixel 1e6", pixel, basis)


def _convolve(x: Tensor, basis: Tensor, grad: Tensor, padding: int) -> tuple[Tensor, ...]:
    x, basis = (tensor.detach().requires_grad_() for tensor in (x, basis))
    y = F.conv2d(x, basis, padding=padding)
    return y.detach(), *torch.autograd.grad(y, (x, basis), grad)


def _basis_convolve(x: Tensor, basis: Tensor, grad: Tensor, padding: int) -> tuple[Tensor, ...]:
    x, basis = (tensor.detach().requires_grad_() for tensor in (x, basis))
    y = gk.basis_conv2d(x, basis, basis.new_empty(0, len(basis)), padding=padding)
    return y.detach(), *torch.autograd.grad(y, (x, basis), grad)


def _with_algorithm(algorithm: str, *call: Any) -> tuple[Tensor, ...]:
    before = gk.conv_algorithm()
    gk.set_conv_algorithm(algorithm)
    try:
        return _basis_convolve(*call)
    finally:
        gk.set_conv_algorithm(before)


def measure() -> list[list[str]]:
    """A row for every layer and result."""
    rows = []
    for layer in _layers():
        x, basis = layer.x.to(memory_format=torch.channels_last), layer.basis
        height, width = (size + 2 * layer.padding - 2 for size in x.shape[2:])
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(len(x), len(basis), height, width, generator=generator)
        grad = grad.to(memory_format=torch.channels_last)
        call = (x, basis, grad)
        wide = x.double(), basis.double(), grad.double()
        sizes = wide[0].abs(), wide[1].abs(), wide[2].abs()
        exact = _convolve(*wide, layer.padding)
        most = _convolve(*sizes, layer.padding)
        found = {
            "Winograd": _with_algorithm("winograd", *call, layer.padding),
            "direct": _with_algorithm("direct", *call, layer.padding),
            "torch": _convolve(*call, layer.padding),
        }
        for index, result in enumerate(("output", "gradient of x", "gradient of the kernel")):
            errors = {
                name: float((parts[index].double() - exact[index]).abs().max())
                for name, parts in found.items()
            }
            largest = float(exact[index].abs().max())
            rows.append(
                [
                    layer.name,
                    str(x.shape[1]),
                    result,
                    *(f"{error / largest:.1e}" for error in errors.values()),
                    f"{errors['Winograd'] / float(most[index].abs().max()):.1e}",
                ]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"store the table in {_DOCUMENT.name}")
    table = markdown.table(_HEADING, measure())
    if not parser.parse_args().write:
        print(table)
        return
    machine = f"{cpu_model()}, {platform.machine()}"
    text = _TEXT.format(machine=machine, torch=torch.__version__, table=table)
    part = _DOCUMENT.with_suffix(".part")
    part.write_text(text)
    os.replace(part, _DOCUMENT)


if __name__ == "__main__":
    main()
