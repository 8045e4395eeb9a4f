"""What is special about basis_conv2d; the rest is in test_contract_*.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_samples import OPS as SAMPLED
from op_samples.basis_conv import SHAPES, WINOGRAD_ERROR, B, C, Shape, X
from op_samples.numbers import LAYOUTS, doubled, largest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import growkernels as gk
from growkernels.ops.basis_conv import reference

OP = SAMPLED["basis_conv2d"]
OPS = torch.ops.growkernels
ALGORITHMS = ["auto", "direct", "winograd"]
CHANNELS_LAST = LAYOUTS["channels_last"]
BOTH_FORMS = pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])


@pytest.fixture(autouse=True)
def _algorithm_is_restored() -> Iterator[None]:
    before = gk.conv_algorithm()
    yield
    gk.set_conv_algorithm(before)


@pytest.mark.parametrize(
    ("shape", "algorithm"),
    [
        (Shape((9, 20, 34, 35), 12, 9), "winograd"),
        (Shape((58, 171, 12, 12), 171, 19), "winograd"),
        (Shape((9, 20, 34, 35), 12, 9, (1, 1), padding=(0, 0)), "pointwise"),
        (Shape((18, 20, 34, 35), 12, 9, stride=(2, 2)), "direct"),
    ],
    ids=str,
)
def test_sums_over_many_pixels(shape: Shape, algorithm: str) -> None:
    """Enough of them that the gradients of the parameters are summed in several parts."""
    sample = shape.sample()
    tensors = [CHANNELS_LAST(t) for t in sample.tensors(torch.float32)]
    chosen = torch.ops.growkernels.basis_conv2d_algorithm
    x, basis, coeff, _, *form = OP.registered(tensors, sample.arguments)
    assert chosen(x, basis, coeff, *form) == algorithm
    expected = OP.with_gradients(OP.oracle, doubled(tensors), sample)
    actual = OP.with_gradients(OP.function, tensors, sample)
    for mine, exact in zip(actual, expected, strict=True):
        assert largest(mine, exact) <= WINOGRAD_ERROR


@BOTH_FORMS
@pytest.mark.parametrize("basis_layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("x_layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("image", [(1, 1, 1, 1), (1, 3, 1, 1), (2, 1, 4, 4), (1, 3, 4, 1),
                                   (2, 3, 4, 5)], ids=str)  # fmt: skip
def test_output_has_the_strides_of_torchs_own_convolution(
    image: tuple[int, int, int, int],
    kernel: int,
    x_layout: torch.memory_format,
    basis_layout: torch.memory_format,
    include_basis: bool,
) -> None:
    shape = Shape(image, 2, 2, (kernel, kernel), padding=(kernel // 2, kernel // 2))
    sample = shape.sample(include_basis, bias=False)
    x, basis, coeff = sample.tensors(torch.float32)
    x = x.contiguous(memory_format=x_layout).requires_grad_()
    basis = basis.contiguous(memory_format=basis_layout).requires_grad_()
    (y,) = OP.results(OP.function, [x, basis, coeff], sample)
    whole = torch.randn(4, image[1], kernel, kernel).contiguous(memory_format=basis_layout)
    theirs = F.conv2d(x.detach(), whole, padding=kernel // 2)
    significant = [i for i, size in enumerate(y.shape) if size > 1]
    assert [y.stride(i) for i in significant] == [theirs.stride(i) for i in significant]
    dx, dbasis = torch.autograd.grad(y.sum(), (x, basis))
    assert dx.stride() == torch.empty_like(x, memory_format=torch.preserve_format).stride()
    assert dbasis.stride() == torch.empty_like(basis).stride()


def test_equals_the_convolution_with_the_whole_kernel() -> None:
    x, basis, coeff, bias = SHAPES[1].sample().tensors(torch.float64)
    whole = torch.cat([basis, torch.einsum("or,rihw->oihw", coeff, basis)])
    expected = F.conv2d(x, whole, bias, padding=1)
    torch.testing.assert_close(gk.basis_conv2d(x, basis, coeff, bias, padding=1), expected)
    whole = torch.einsum("or,rihw->oihw", torch.cat([torch.eye(8), coeff]), basis)
    full = torch.cat([torch.eye(8, dtype=torch.float64), coeff])
    actual = gk.basis_conv2d(x, basis, full, bias, padding=1, include_basis=False)
    torch.testing.assert_close(actual, F.conv2d(x, whole, bias, padding=1))


@pytest.mark.parametrize("mask", [(m & 1, m & 2, m & 4, m & 8) for m in range(16)], ids=str)
@BOTH_FORMS
def test_only_the_gradients_asked_for(mask: tuple[int, ...], include_basis: bool) -> None:
    sample = SHAPES[1].sample(include_basis)
    wanted = [bool(m) for m in mask]
    tensors = sample.tensors(torch.float32)
    x, basis, coeff, bias = tensors
    g = torch.randn_like(OP.results(OP.function, tensors, sample)[0])
    z = F.conv2d(x, basis, padding=1) + (bias[:8, None, None] if include_basis else 0)
    results = OPS.basis_conv2d_backward(
        g, x, basis, coeff, z, bias[:8] if include_basis else None, [1, 1], [1, 1], [1, 1],
        include_basis, wanted,
    )  # fmt: skip
    leaves = [t.double().requires_grad_() for t in tensors]
    (y,) = OP.results(OP.oracle, leaves, sample)
    expected = torch.autograd.grad(y, leaves, g.double())
    for mine, exact, asked_for in zip(results, expected, wanted, strict=True):
        assert (mine is not None) == asked_for
        if mine is not None:
            assert largest(mine, exact) <= WINOGRAD_ERROR


@BOTH_FORMS
def test_gradients_of_the_backward_op(include_basis: bool) -> None:
    """It is differentiable by itself, z and z_bias being inputs like the others."""
    sample = Shape((2, 2, 4, 3), 2, 1).sample(include_basis)
    x, basis, coeff, bias = sample.tensors(torch.float64)
    g = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    z, z_bias = F.conv2d(x, basis, padding=1), bias[:2].clone()
    tensors = [t.requires_grad_() for t in (g, x, basis, coeff, z, z_bias)]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = OPS.basis_conv2d_backward(
            *arguments, [1, 1], [1, 1], [1, 1], include_basis, [True] * 4
        )
        return results

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_maps_are_differentiable_too() -> None:
    sample = Shape((2, 2, 4, 3), 2, 1).sample(include_basis=False)
    tensors = [t.requires_grad_() for t in sample.tensors(torch.float64)]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = OPS.basis_conv2d_with_maps(
            *arguments, [1, 1], [1, 1], [1, 1], False
        )
        return results

    assert torch.autograd.gradcheck(function, tensors)
    y, z = function(*tensors)
    torch.testing.assert_close(y, gk.basis_conv2d(*tensors, **sample.arguments))
    torch.testing.assert_close(z, F.conv2d(tensors[0], tensors[1], padding=1))


@BOTH_FORMS
def test_output_may_be_overwritten_before_the_backward_pass(include_basis: bool) -> None:
    sample = SHAPES[1].sample(include_basis)
    tensors = sample.tensors(torch.float32)

    def in_place(*arguments: Tensor, **form: Any) -> Tensor:
        return gk.basis_conv2d(*arguments, **form).relu_()

    def out_of_place(*arguments: Tensor, **form: Any) -> Tensor:
        return reference.basis_conv2d(*arguments, **form).relu()

    expected = OP.with_gradients(out_of_place, doubled(tensors), sample)
    for mine, exact in zip(OP.with_gradients(in_place, tensors, sample), expected, strict=True):
        assert largest(mine, exact) <= WINOGRAD_ERROR


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@BOTH_FORMS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_of_the_ops_behind_it(
    layout: torch.memory_format, include_basis: bool, requires_grad: bool
) -> None:
    sample = Shape((2, 3, 5, 6), 2, 3).sample(include_basis)
    x, basis, coeff, _ = sample.tensors(torch.float32)
    x = x.contiguous(memory_format=layout)
    g, z = torch.randn(2, 5, 5, 6), F.conv2d(x, basis, padding=1)
    for tensor in (x, basis, coeff, g, z):
        tensor.requires_grad_(requires_grad)
    form = ([1, 1], [1, 1], [1, 1], include_basis)
    if not include_basis:
        torch.library.opcheck(OPS.basis_conv2d_with_maps.default, (x, basis, coeff, None, *form))
    for mask in ([True] * 4, [True, False, True, False]):
        torch.library.opcheck(
            OPS.basis_conv2d_backward.default, (g, x, basis, coeff, z, None, *form, mask)
        )


def test_flops_of_the_gradients_asked_for() -> None:
    sample = Shape((2, 3, 6, 5), 4, 6).sample(include_basis=False)
    convolution, mixing = 2 * 2 * 30 * 4 * 3 * 9, 2 * 2 * 30 * 10 * 4
    tensors = [t.requires_grad_() for t in sample.tensors(torch.float32)]
    with FlopCounterMode(display=False) as counter:
        y = gk.basis_conv2d(*tensors, **sample.arguments)
        torch.autograd.grad(y.sum(), tensors[1])
    assert counter.get_total_flops() == 2 * convolution + 2 * mixing


BACKEND_PROGRAM = """
import torch
import growkernels as gk
from growkernels.ops.basis_conv import reference
generator = torch.Generator().manual_seed(0)
assert gk.conv_algorithm() == "winograd"
for algorithm in ("winograd", "direct", "auto"):
    gk.set_conv_algorithm(algorithm)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float64, 1e-13)):
        for sizes in ((2, 19, 9, 10, 7, 20), (3, 32, 8, 8, 16, 32)):
            n, channels, height, width, filters, outputs = sizes
            shapes = ((n, channels, height, width), (filters, channels, 3, 3),
                      (outputs - filters, filters), (outputs,))
            drawn = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
            leaves = [t.requires_grad_() for t in drawn]
            exact = [t.detach().double().requires_grad_() for t in leaves]
            y = gk.basis_conv2d(*leaves, padding=1)
            oracle = reference.basis_conv2d(*exact, padding=1)
            y.backward(torch.ones_like(y))
            oracle.backward(torch.ones_like(oracle))
            pairs = [(y, oracle), *((a.grad, b.grad) for a, b in zip(leaves, exact))]
            for mine, theirs in pairs:
                error = (mine - theirs).abs().max()
                assert error <= tolerance * theirs.abs().max(), (algorithm, dtype, error)
"""


def test_setting_from_the_environment() -> None:
    environment = {**os.environ, "GROWKERNELS_CONV_ALGORITHM": "winograd"}
    subprocess.run([sys.executable, "-c", BACKEND_PROGRAM], env=environment, check=True)


def test_algorithm_is_read_back() -> None:
    for algorithm in ALGORITHMS:
        gk.set_conv_algorithm(algorithm)
        assert gk.conv_algorithm() == algorithm
    with pytest.raises(ValueError, match="unknown algorithm 'fft'; use 'auto', 'direct' or 'win"):
        gk.set_conv_algorithm("fft")
    assert gk.conv_algorithm() == "winograd"


def test_unknown_algorithm_in_the_environment() -> None:
    program = "import growkernels as gk; gk.conv_algorithm()"
    environment = {**os.environ, "GROWKERNELS_CONV_ALGORITHM": "fast"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert "GROWKERNELS_CONV_ALGORITHM: unknown algorithm 'fast'; use" in finished.stderr


def test_bad_gradients_are_one_sentence() -> None:
    g, z, form = torch.ones(2, 6, 8, 8), torch.ones(2, 2, 8, 8), ([1, 1], [1, 1], [1, 1])
    backward, mask = OPS.basis_conv2d_backward, [True] * 4
    with pytest.raises(ValueError, match=r"grad has shape .*the output has shape \[2, 6, 8, 8\]"):
        backward(g[:, 1:], X, B, C, z, None, *form, True, mask)
    with pytest.raises(ValueError, match=r"z has shape .*the maps of the basis have shape"):
        backward(g, X, B, C, z[:, :1], None, *form, True, mask)
    with pytest.raises(ValueError, match=r"z_bias has shape .*each of 2 basis filters"):
        backward(g, X, B, C, z, torch.ones(6), *form, True, mask)
    with pytest.raises(ValueError, match="the first channels of the output; call basis_conv2d"):
        OPS.basis_conv2d_with_maps(X, B, C, None, *form, True)
