"""`python tests/gpu/sanitized_calls.py cuda`: small calls of all kernels, for compute-sanitizer.

Sizes are odd where kernels have edges. Whether results are right is for the tests to say; here they
only have to be finite, so that memory that was read before it was written may show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import growkernels as gk


def normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def basis_conv(device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    # Enough images to fill a GPU: with fewer, other libraries' kernels are chosen.
    for channels, filters, outputs, kernel in ((48, 31, 66, 3), (96, 31, 67, 1)):
        x = normal(device, dtype, 56, channels, 17, 19)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        basis = normal(device, dtype, filters, channels, kernel, kernel).requires_grad_()
        coeff = normal(device, dtype, outputs - filters, filters).requires_grad_()
        y = gk.basis_conv2d(x, basis, coeff, padding=kernel // 2)
        yield y
        yield from torch.autograd.grad(y.float().square().sum(), (x, basis, coeff))


def splitting(device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    x, w = normal(device, dtype, 197, 96), normal(device, dtype, 197, 67)
    yield gk.splitting_weight(w, normal(device, dtype, 197, 67))
    yield gk.splitting_hvp(x, w, normal(device, dtype, 67, 96))
    yield gk.splitting_hvp(x, w, normal(device, dtype, 67, 3, 96))
    yield gk.splitting_hvp(normal(device, dtype, 197, 580), w, normal(device, dtype, 67, 580))
    images, weights = normal(device, dtype, 2, 32, 9, 7), normal(device, dtype, 2, 19, 9, 7)
    yield gk.splitting_hvp_conv2d(images, weights, normal(device, dtype, 19, 32, 3, 3), padding=1)
    if dtype == torch.float32:
        yield from gk.splitting_eigs(x, w[:, :5].contiguous(), k=2)[:2]


def virtual_grad(device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    shapes = ((50, 5), (197, 96), (130, 67))
    inputs = [normal(device, dtype, *shape) for shape in shapes]
    grads = [normal(device, dtype, *shape) for shape in shapes]
    for layer in ("linear_relu", "residual"):
        yield gk.virtual_grad_norms(inputs, grads, layer)
        yield from gk.virtual_grads(inputs, grads, layer)
    h, g = normal(device, dtype, 2, 16, 9, 7), normal(device, dtype, 2, 16, 9, 7)
    yield gk.virtual_grad_norms([h], [g], "conv2d_relu")


def main(device: str) -> None:
    torch.manual_seed(0)
    # What is compiled already comes first: Triton's compiler takes long under the sanitizer.
    for family in (virtual_grad, splitting, basis_conv):
        for dtype in (torch.float32, torch.bfloat16):
            results = list(family(device, dtype))
            if not all(bool(result.isfinite().all()) for result in results):
                sys.exit(f"{family.__name__} {dtype}: a result is not finite")
            print(f"{family.__name__} {dtype}: {len(results)} tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
