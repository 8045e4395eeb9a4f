"""Kernels that ask for more than a GPU has, for the test that the check of resources can fail.

Never imported by the tests themselves: there, Triton interprets kernels and cannot compile them.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from triton_builds import TritonBuild


@triton.jit
def normalize(values, block: tl.constexpr):
    positions = tl.arange(0, block)
    loaded = tl.load(values + positions)
    tl.store(values + positions, loaded / tl.sum(loaded))


@triton.jit
def product(left, right, out, depth, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr):
    rows, columns, inner = tl.arange(0, m), tl.arange(0, n), tl.arange(0, k)
    total = tl.zeros((m, n), tl.float32)
    for start in range(0, depth, k):
        a = tl.load(left + rows[:, None] * depth + start + inner[None, :])
        b = tl.load(right + (start + inner[:, None]) * n + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out + rows[:, None] * n + columns[None, :], total)


def builds() -> Iterator[TritonBuild]:
    one_vector = {"values": "*fp32:16"}
    yield TritonBuild("modest", normalize, one_vector, {"block": 1024}, num_warps=4, num_stages=1)
    yield TritonBuild("spilling", normalize, one_vector, {"block": 16384}, 1, 1)
    matrices = {"left": "*bf16:16", "right": "*bf16:16", "out": "*fp32:16", "depth": "i32:16"}
    yield TritonBuild("oversized", product, matrices, {"m": 128, "n": 128, "k": 64}, 8, 8)
