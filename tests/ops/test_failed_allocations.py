"""Memory that the system refuses, for results and for scratch of all threads, is an exception, and
the next call is right. Run as a program, this file makes the calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import growkernels as gk

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from limited_memory import ENVIRONMENT, refusals  # noqa: E402


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Any]:
    def call() -> list[Any]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        out.sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    return call


def calls() -> dict[str, Callable[[], Any]]:
    x, basis, coeff = torch.randn(4, 32, 64, 64), torch.randn(24, 32, 3, 3), torch.randn(40, 24)
    rows, w, v = torch.randn(2048, 256), torch.randn(2048, 512), torch.randn(512, 256)
    images, slopes = torch.randn(4, 32, 48, 48), torch.randn(4, 64, 48, 48)
    filters = torch.randn(64, 32, 3, 3)
    inputs = [torch.randn(512, width) for width in (1024, 1536)]
    grads = [torch.randn(512, width) for width in (1024, 1536)]
    maps = [torch.randn(4, 256, 32, 32)], [torch.randn(4, 256, 32, 32)]
    square = torch.randn(300, 60, 60)
    symmetric = square + square.mT

    def convolved(x: Tensor, basis: Tensor, coeff: Tensor, stride: int = 1) -> Tensor:
        return gk.basis_conv2d(x, basis, coeff, stride=stride, padding=1)

    def halved(*tensors: Tensor) -> list[Tensor]:
        return [tensor.bfloat16() for tensor in tensors]

    found: dict[str, Callable[[], Any]] = {
        "basis_conv2d": lambda: convolved(x, basis, coeff),
        "basis_conv2d, strided": lambda: convolved(x, basis, coeff, 2),
        "basis_conv2d, bfloat16": lambda: convolved(*halved(x, basis, coeff)),
        "basis_conv2d, gradients": with_gradients(convolved, x, basis, coeff),
        "splitting_hvp, bfloat16": lambda: gk.splitting_hvp(*halved(rows, w, v)),
        "splitting_weight": lambda: gk.splitting_weight(slopes, slopes),
        "splitting_hvp_conv2d": lambda: gk.splitting_hvp_conv2d(images, slopes, filters, padding=1),
        "splitting_hvp_conv2d, float64": lambda: gk.splitting_hvp_conv2d(
            images.double(), slopes.double(), filters.double(), padding=1
        ),
        "splitting_eigs": lambda: gk.splitting_eigs(rows, w, iters=3, tol=0.9),
        "symmetric_eigs": lambda: torch.ops.growkernels.symmetric_eigs(symmetric, None),
        "virtual_grads, conv2d_relu": lambda: gk.virtual_grads(*maps, "conv2d_relu"),
        "virtual_grad_norms, conv2d_relu": lambda: gk.virtual_grad_norms(*maps, "conv2d_relu"),
    }
    for kind in ("linear_relu", "residual", "linear"):
        found[f"virtual_grads, {kind}"] = lambda kind=kind: gk.virtual_grads(inputs, grads, kind)
    return found


def flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    assert isinstance(value, Sequence)
    return [tensor for entry in value for tensor in flat(entry)]


def make_all_calls(threads: int) -> dict[str, int]:
    """How often each was refused."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # What torch starts once, threads among it, is no matter of ours; oneDNN does not forget that
    # it had no memory for a convolution's code: of these sizes none is made again in this process.
    shapes = torch.ones(4, 32, 64, 64), torch.ones(24, 32, 3, 3)
    torch.nn.functional.conv2d(*shapes, stride=2, padding=1)
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    torch.ones(2**22).exp()
    found = {}
    for name, call in calls().items():
        print(name, file=sys.stderr, flush=True)  # the last one, should the process abort
        found[name], result = refusals(call)
        again = call()
        # A vendor's product may take another way where there is little memory.
        for one, other in zip(flat(result), flat(again), strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_refused_memory_is_an_exception(threads: int) -> None:
    finished = subprocess.run(
        [sys.executable, __file__, str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert len(found) > 10
    assert [name for name, count in found.items() if count < 2] == []


if __name__ == "__main__":
    print(json.dumps(make_all_calls(int(sys.argv[1]))))
