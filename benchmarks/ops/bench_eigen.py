"""Eigenpairs of many small symmetric matrices: `symmetric_eigs` against `torch.linalg.eigh`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.case import OURS, Case, Workload
from benchmarks.table import Table
from growkernels.ops.eigen import symmetric_eigs

FAMILY = "eigen"
KERNELS = ("eigen",)
TABLE = Table(
    name=FAMILY,
    family=FAMILY,
    columns=(
        "case", "shape", "dtype", "growkernels", "peak memory", "opponent", "speed-up",
        "opponent's time", "opponent's memory", "machine",
    ),
)  # fmt: skip


def _build(n: int, m: int, k: int | None, dtype: torch.dtype, device: torch.device) -> Workload:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, m, m, generator=generator, dtype=torch.float64)
    a = (a + a.mT).to(device, dtype)
    pairs = m if k is None else k
    calls = {
        "torch.linalg.eigh": lambda: torch.linalg.eigh(a)[0][:, :pairs],
        OURS: lambda: symmetric_eigs(a, k)[0],
    }
    # Of the tridiagonal form alone, which every way but rotations goes through.
    return Workload(calls, 4 / 3 * n * m**3, float(a.nbytes), 1e-4)


def _case(name: str, n: int, m: int, k: int | None, dtype: torch.dtype) -> Case:
    return Case(
        name=name,
        shape=f"[{n}, {m}, {m}]",
        dtype=dtype,
        layout="contiguous",
        direction="all pairs" if k is None else f"{k} smallest",
        opponents=("torch.linalg.eigh",),
        build=partial(_build, n, m, k, dtype),
    )


CASES = [
    _case("a solver's projections, k = 1", 1536, 6, None, torch.float64),
    _case("a solver's projections, k = 2", 1536, 12, None, torch.float64),
    _case("smallest pair of 32 rows", 1024, 32, 1, torch.float32),
    _case("smallest pair of 64 rows", 1024, 64, 1, torch.float32),
    _case("four smallest pairs of 96 rows", 256, 96, 4, torch.float32),
]


def bench_eigen(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
