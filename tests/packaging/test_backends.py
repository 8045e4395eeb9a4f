"""The backend table: every op has an answer for every device and dtype, reasons included."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import growkernels as gk
from growkernels.ops import backends

CPU_CASES = [(op, dtype) for op in backends.EXAMPLES for dtype in backends.DTYPES]


@pytest.mark.parametrize(("op", "dtype"), CPU_CASES)
def test_cpu_always_has_a_backend(op: str, dtype: torch.dtype) -> None:
    choice = backends.choose_backend(op, "cpu", dtype)
    devices = backends.EXAMPLES[op].backends
    refused = dict(choice.refused)
    elsewhere = {name for name, used_on in devices.items() if used_on and "cpu" not in used_on}
    if op == "symmetric_eigs" and dtype.itemsize == 2:
        assert choice.backend is None
        assert refused["portable"] == "it takes float32 and float64"
        return
    assert {refused[name] for name in elsewhere & refused.keys()} <= {"the tensors are on cpu"}
    assert choice.backend in devices.keys() - elsewhere
    if choice.backend == "aten":  # torch's own ops: no kernel of ours was found
        assert op.endswith("[conv2d_relu]")
        assert dtype != torch.float32


def test_float64_has_no_tiles_of_bfloat16() -> None:
    choice = backends.choose_backend("virtual_grads", "cpu", torch.float64)
    assert choice.backend in ("portable", "vendor's product")
    assert ("bfloat16 tiles", "they are for bfloat16") in choice.refused


def test_basis_convolutions_tell_why_winograd_is_not_used() -> None:
    before = gk.conv_algorithm()
    try:
        gk.set_conv_algorithm("winograd")
        chosen = backends.choose_backend("basis_conv2d[3x3]", "cpu", torch.float32)
        assert chosen.backend == "winograd"
        gk.set_conv_algorithm("direct")
        direct = dict(backends.choose_backend("basis_conv2d[3x3]", "cpu", torch.float32).refused)
        assert "asks for 'direct'" in direct["winograd"]
    finally:
        gk.set_conv_algorithm(before)
    exact = dict(backends.choose_backend("basis_conv2d[3x3]", "cpu", torch.float64).refused)
    assert exact["winograd"] == "it is for float32"
    pixelwise = dict(backends.choose_backend("basis_conv2d[1x1]", "cpu", torch.float32).refused)
    assert pixelwise["winograd"] == "it is for 3 x 3 kernels with stride and dilation 1"


def test_switch_forces_the_portable_backend() -> None:
    program = (
        "import torch; from growkernels.ops.backends import choose_backend; "
        "print(choose_backend('virtual_grads', 'cpu', torch.bfloat16))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={"GROWKERNELS_BFLOAT16_TILES": "none", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "backend='portable'" in printed
    assert "('bfloat16 tiles', 'GROWKERNELS_BFLOAT16_TILES=none')" in printed


def test_other_devices_use_composed_torch_ops() -> None:
    choice = backends.choose_backend("virtual_grad_norms", "meta", torch.float32)
    assert choice.backend == "aten"
    expected = ["cuda", "bfloat16 tiles", "vendor's product", "portable"]
    assert [name for name, _ in choice.refused] == expected


def test_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="'no_op' is not an op of growkernels; choose from"):
        backends.choose_backend("no_op", "cpu", torch.float32)


def test_integers_have_no_backend() -> None:
    with pytest.raises(TypeError, match=r"virtual_grads takes float32, .* not int64"):
        backends.choose_backend("virtual_grads", "cpu", torch.int64)
