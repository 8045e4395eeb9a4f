"""The dense opponent by our own kernels computes the layer that the basis describes."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import OURS, check_agreement
from benchmarks.ops import bench_basis_conv
from benchmarks.ops.bench_basis_conv import CASES


def test_every_case_is_compared_with_our_own_dense_convolution() -> None:
    for case in CASES:
        assert "ours, dense" in case.opponents


def test_our_dense_convolution_computes_the_same_layer() -> None:
    case = next(case for case in CASES if case.name == "batch 1, forward")
    workload = case.build(torch.device("cpu"))
    check_agreement(case, workload)
    ours, dense = (workload.calls[name]() for name in (OURS, "ours, dense"))
    assert isinstance(ours, torch.Tensor)
    assert isinstance(dense, torch.Tensor)
    assert ours.shape == dense.shape


def test_gradients_of_a_dense_layer_are_not_compared() -> None:
    build = partial(
        bench_basis_conv._build, (1, 8, 4, 4), 4, 8, 3, 1, torch.float32, "channels_last",
        "forward + backward",
    )  # fmt: skip
    calls = build(("ours, dense", OURS), torch.device("cpu")).calls
    assert calls["ours, dense"]() is None
    assert calls[OURS]() is not None
