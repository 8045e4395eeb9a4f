"""The rates this machine reaches at best, measured in the same run as the variants.

`python -m benchmarks.ceilings cuda` prints them alone, as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.case import Ceiling
from benchmarks.cuda_timing import CudaDevice, QueuedTimer

_GEMM_MILLISECONDS = 60
# Far beyond every cache, so memory is what is measured.
_COPY_BYTES = 256 * 2**20
_CUDA_COPY_BYTES = 2**30
_CUDA_GEMM_SIZE = 8192


def ceiling_probe(kind: Ceiling, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A function that measures the ceiling once: FLOP/s for "gemm", bytes/s for "copy".

    On the CPU "gemm" is the op library's loop over independent cache-resident tiles on all
    threads; on a GPU it is `torch.mm` of two normal matrices of 8192 rows and columns (of zeros it
    would be faster), for float32 in TF32 where torch is set to use that. "copy" counts bytes read
    plus bytes written.
    """
    if kind == "gemm":
        return _cpu_gemm(dtype) if device.type == "cpu" else _cuda_gemm(dtype, device)
    return _copy(device)


def _cpu_gemm(dtype: torch.dtype) -> Callable[[], float]:
    import growkernels  # noqa: F401  (loads the op library)

    return lambda: 1e9 * float(torch.ops.growkernels.gemm_ceiling(dtype, _GEMM_MILLISECONDS))


def _cuda_gemm(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    n = _CUDA_GEMM_SIZE
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(n, n, device=device, generator=generator).to(dtype).contiguous()
        for _ in range(2)
    )
    out = torch.empty_like(a)
    timer = QueuedTimer(CudaDevice(device), flush=True)

    def product() -> None:
        torch.mm(a, b, out=out)

    timer(product, 1)  # the library chooses its kernel and takes its workspace
    return lambda: 4 * 2 * n**3 / timer(product, 4)


def _copy(device: torch.device) -> Callable[[], float]:
    size = _COPY_BYTES if device.type == "cpu" else _CUDA_COPY_BYTES
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        timer = QueuedTimer(CudaDevice(device), flush=True)
        return lambda: 4 * 2 * size / timer(lambda: target.copy_(source), 4)

    def measure() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return 2 * size / (time.perf_counter() - start)

    measure()  # touches the target's pages
    return measure


def measure_all(device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Medians over `rounds`: FLOP/s by dtype (on a GPU TF32 apart from float32), bytes/s of copies.

    Sets torch to use TF32 or not, and leaves it at what it was.
    """
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if device.type == "cpu":
        del kinds["float16"]  # no tiles of its own
    else:
        kinds["tf32"] = torch.float32
    precision = torch.get_float32_matmul_precision()
    found = {}
    try:
        for name, dtype in kinds.items():
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            probe = ceiling_probe("gemm", dtype, device)
            found[name] = statistics.median(probe() for _ in range(rounds))
    finally:
        torch.set_float32_matmul_precision(precision)
    probe = ceiling_probe("copy", torch.float32, device)
    found["copy"] = statistics.median(probe() for _ in range(rounds))
    return found


if __name__ == "__main__":
    print(json.dumps(measure_all(torch.device(sys.argv[1]))))
