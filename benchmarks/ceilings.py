"""The rates this machine reaches at best, measured in the same run as the variants."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.case import Ceiling
from benchmarks.interleave import cuda_timer

_GEMM_MILLISECONDS = 60
_COPY_BYTES = 256 * 2**20  # far beyond every cache, so memory is what is measured
_CUDA_GEMM_SIZE = 8192


def ceiling_probe(kind: Ceiling, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A function that measures the ceiling once: FLOP/s for "gemm", bytes/s for "copy".

    On the CPU "gemm" is the op library's loop over independent cache-resident brgemm tiles on all
    threads; on a GPU it is a large `torch.mm`. "copy" counts bytes read plus bytes written.
    """
    if kind == "gemm":
        return _cpu_gemm(dtype) if device.type == "cpu" else _cuda_gemm(dtype, device)
    return _copy(device)


def _cpu_gemm(dtype: torch.dtype) -> Callable[[], float]:
    import growkernels  # noqa: F401  (loads the op library)

    return lambda: 1e9 * float(torch.ops.growkernels.gemm_ceiling(dtype, _GEMM_MILLISECONDS))


def _cuda_gemm(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    n = _CUDA_GEMM_SIZE
    a = torch.ones(n, n, dtype=dtype, device=device)
    out = torch.empty_like(a)
    timer = cuda_timer()
    return lambda: 4 * 2 * n**3 / timer(lambda: torch.mm(a, a, out=out), 4)


def _copy(device: torch.device) -> Callable[[], float]:
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        timer = cuda_timer()
        return lambda: 2 * _COPY_BYTES / timer(lambda: target.copy_(source), 1)

    def measure() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return 2 * _COPY_BYTES / (time.perf_counter() - start)

    measure()  # touches the target's pages
    return measure
