"""A build that leaves out an argument of its kernel."""

from __future__ import annotations

from collections.abc import Iterator

from greedy_kernels import normalize
from triton_builds import TritonBuild


def builds() -> Iterator[TritonBuild]:
    yield TritonBuild("incomplete", normalize, {"values": "*fp32:16"}, {}, 1, 1)
