"""basis_conv2d against the oracle, and against the convolution with the whole kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import growkernels as gk
from growkernels.ops.basis_conv import reference

OPS = torch.ops.growkernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALGORITHMS = ["auto", "direct", "winograd"]
# max |error| / max |oracle|, float32; see set_conv_algorithm.
WINOGRAD_ERROR = 1e-5


class Shape(NamedTuple):
    """Sizes of one call; a bias is added in every second test."""

    x: tuple[int, int, int, int]
    filters: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in self)


# Channels beside multiples of 16, images beside multiples of Winograd's tile, all on purpose.
SHAPES = [
    Shape((2, 3, 8, 8), 2, 5),
    Shape((2, 16, 7, 9), 8, 16),
    Shape((1, 17, 13, 6), 1, 33),
    Shape((2, 5, 6, 5), 7, 7),
    Shape((1, 1, 1, 1), 1, 1, (1, 1), padding=(0, 0)),
    Shape((0, 4, 6, 6), 3, 6),
    Shape((2, 8, 1, 1), 4, 8),
    Shape((1, 40, 10, 10), 24, 70, padding=(0, 0)),
    Shape((2, 33, 5, 3), 20, 47, padding=(2, 2)),
    Shape((3, 64, 8, 8), 32, 64),
    Shape((2, 6, 9, 8), 4, 9, stride=(2, 2)),
    Shape((2, 6, 9, 8), 4, 9, padding=(2, 2), dilation=(2, 2)),
    Shape((2, 6, 9, 8), 4, 9, (1, 1), padding=(0, 0)),
    Shape((2, 16, 8, 8), 8, 32, (1, 1), (2, 2), (0, 0)),
    Shape((2, 6, 9, 8), 4, 9, (5, 5), padding=(2, 2)),
    Shape((1, 3, 12, 10), 4, 8, (2, 3), (2, 1), (1, 0), (1, 2)),
]
SMALL = [SHAPES[0], SHAPES[10], SHAPES[12], SHAPES[15]]


@pytest.fixture(autouse=True)
def _algorithm_is_restored() -> Iterator[None]:
    before = gk.conv_algorithm()
    yield
    gk.set_conv_algorithm(before)


def make(
    shape: Shape, dtype: torch.dtype, include_basis: bool = True, bias: bool = True, seed: int = 0
) -> list[Tensor]:
    """x, basis, coeff and, where asked for, bias."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape.x[1]
    rows = shape.outputs - shape.filters if include_basis else shape.outputs
    sizes: list[tuple[int, ...]] = [
        shape.x, (shape.filters, channels, *shape.kernel), (rows, shape.filters),
    ]  # fmt: skip
    if bias:
        sizes.append((shape.outputs,))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def parameters(shape: Shape) -> dict[str, Any]:
    return {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation}


def ours(tensors: list[Tensor], shape: Shape, include_basis: bool) -> Tensor:
    options: dict[str, Any] = {**parameters(shape), "include_basis": include_basis}
    x, basis, coeff, *bias = tensors
    y: Tensor = gk.basis_conv2d(x, basis, coeff, bias[0] if bias else None, **options)
    return y


def oracle(tensors: list[Tensor], shape: Shape, include_basis: bool) -> Tensor:
    x, basis, coeff, *bias = (t.double() for t in tensors)
    options: dict[str, Any] = {**parameters(shape), "include_basis": include_basis}
    y: Tensor = reference.basis_conv2d(x, basis, coeff, bias[0] if bias else None, **options)
    return y


def plain_torch(tensors: list[Tensor], shape: Shape, include_basis: bool) -> Tensor:
    """What a user would write, in the dtype of the tensors."""
    x, basis, coeff, *rest = tensors
    z = F.conv2d(x, basis, None, **parameters(shape))
    if include_basis:
        mixed = F.conv2d(z, coeff[:, :, None, None]) if len(coeff) else z[:, :0]
        y = torch.cat([z, mixed], dim=1)
    else:
        y = F.conv2d(z, coeff[:, :, None, None])
    return y + rest[0][:, None, None] if rest else y


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], g: Tensor, *rest: Any
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype), allow_unused=True)]


def relative(actual: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / norm if norm else 0.0


def largest(actual: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    peak = expected.double().abs().max().item()
    return (actual.double() - expected.double()).abs().max().item() / (peak or 1.0)


def random_like_output(shape: Shape, tensors: list[Tensor], include_basis: bool) -> Tensor:
    y = ours(tensors, shape, include_basis)
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_direct_error_is_at_most_twice_plain_torch(
    shape: Shape, dtype: torch.dtype, layout: str, include_basis: bool, bias: bool
) -> None:
    """The output and every gradient."""
    if shape.filters > shape.outputs:
        include_basis = True
    gk.set_conv_algorithm("direct")
    tensors = make(shape, dtype, include_basis, bias)
    if layout == "channels_last":
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    g = random_like_output(shape, tensors, include_basis)
    expected = gradients(oracle, tensors, g, shape, include_basis)
    theirs = gradients(plain_torch, tensors, g, shape, include_basis)
    actual = gradients(ours, tensors, g, shape, include_basis)
    # float64 has no finer oracle: both sides carry rounding errors of this size.
    slack = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    for mine, plain, exact in zip(actual, theirs, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == exact.shape
        assert relative(mine, exact) <= 2 * relative(plain, exact) + slack


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("algorithm", ["auto", "winograd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_of_every_algorithm(
    shape: Shape, algorithm: str, layout: str, include_basis: bool
) -> None:
    gk.set_conv_algorithm(algorithm)
    tensors = make(shape, torch.float32, include_basis)
    if layout == "channels_last":
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    g = random_like_output(shape, tensors, include_basis)
    expected = gradients(oracle, tensors, g, shape, include_basis)
    for mine, exact in zip(
        gradients(ours, tensors, g, shape, include_basis), expected, strict=True
    ):
        assert largest(mine, exact) <= WINOGRAD_ERROR


@pytest.mark.parametrize(
    ("shape", "algorithm"),
    [
        (Shape((9, 20, 34, 35), 12, 21), "winograd"),
        (Shape((58, 171, 12, 12), 171, 190), "winograd"),
        (Shape((9, 20, 34, 35), 12, 21, (1, 1), padding=(0, 0)), "pointwise"),
        (Shape((18, 20, 34, 35), 12, 21, stride=(2, 2)), "direct"),
    ],
    ids=str,
)
def test_sums_over_many_pixels(shape: Shape, algorithm: str) -> None:
    """Enough of them that the gradients of the parameters are summed in several parts."""
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
               for t in make(shape, torch.float32)]  # fmt: skip
    options = [list(value) for value in parameters(shape).values()]
    assert torch.ops.growkernels.basis_conv2d_algorithm(*tensors[:3], *options, True) == algorithm
    g = random_like_output(shape, tensors, True)
    expected = gradients(oracle, tensors, g, shape, True)
    for mine, exact in zip(gradients(ours, tensors, g, shape, True), expected, strict=True):
        assert largest(mine, exact) <= WINOGRAD_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "winograd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_in_16_bit(shape: Shape, algorithm: str, dtype: torch.dtype) -> None:
    """At most a few roundings of the result, whatever the algorithm."""
    gk.set_conv_algorithm(algorithm)
    tensors = make(shape, dtype)
    g = random_like_output(shape, tensors, True)
    expected = gradients(oracle, tensors, g, shape, True)
    for mine, exact in zip(gradients(ours, tensors, g, shape, True), expected, strict=True):
        assert relative(mine, exact) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_float64_is_never_winograd(algorithm: str) -> None:
    gk.set_conv_algorithm(algorithm)
    tensors = make(SHAPES[1], torch.float64)
    actual = ours(tensors, SHAPES[1], True)
    gk.set_conv_algorithm("direct")
    assert torch.equal(actual, ours(tensors, SHAPES[1], True))


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "rows padded": lambda t: F.pad(t, (0, 3))[..., :-3],
        "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every other image": lambda t: t.repeat_interleave(2, 0)[::2],
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "channels of a wider channels_last": lambda t: torch.cat([t, t], 1).contiguous(
            memory_format=torch.channels_last
        )[:, : t.shape[1]],
        "expanded": lambda t: t[:1].expand(t.shape),
        "expanded pixels": lambda t: t[..., :1, :1].expand(t.shape),
    }


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("shape", [*SMALL, SHAPES[1], SHAPES[9]], ids=str)
def test_strides_do_not_matter(shape: Shape, layout: str, include_basis: bool) -> None:
    x, basis, coeff, bias = make(shape, torch.float32, include_basis)
    arrange = layouts()[layout]
    x, basis = arrange(x), arrange(basis)
    g = random_like_output(shape, [x, basis, coeff, bias], include_basis)
    coeff, bias = coeff.T.contiguous().T, bias.repeat_interleave(2)[::2]
    leaves = [t.detach().requires_grad_() for t in (x, basis, coeff, bias)]
    y = ours(leaves, shape, include_basis)
    results = [y, *torch.autograd.grad(y, leaves, arrange(g) if g.shape[0] else g)]
    g = arrange(g)
    expected = gradients(oracle, [x, basis, coeff, bias], g, shape, include_basis)
    for mine, exact in zip(results, expected, strict=True):
        assert largest(mine, exact) <= WINOGRAD_ERROR


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
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
    shape = Shape(image, 2, 4, (kernel, kernel), padding=(kernel // 2, kernel // 2))
    x, basis, coeff = make(shape, torch.float32, include_basis, bias=False)
    x = x.contiguous(memory_format=x_layout).requires_grad_()
    basis = basis.contiguous(memory_format=basis_layout).requires_grad_()
    y = ours([x, basis, coeff], shape, include_basis)
    whole = torch.randn(4, image[1], kernel, kernel).contiguous(memory_format=basis_layout)
    theirs = F.conv2d(x.detach(), whole, padding=kernel // 2)
    significant = [i for i, size in enumerate(y.shape) if size > 1]
    assert [y.stride(i) for i in significant] == [theirs.stride(i) for i in significant]
    dx, dbasis = torch.autograd.grad(y.sum(), (x, basis))
    assert dx.stride() == torch.empty_like(x, memory_format=torch.preserve_format).stride()
    assert dbasis.stride() == torch.empty_like(basis).stride()


def test_equals_the_convolution_with_the_whole_kernel() -> None:
    x, basis, coeff, bias = make(SHAPES[1], torch.float64)
    whole = torch.cat([basis, torch.einsum("or,rihw->oihw", coeff, basis)])
    expected = F.conv2d(x, whole, bias, padding=1)
    torch.testing.assert_close(gk.basis_conv2d(x, basis, coeff, bias, padding=1), expected)
    whole = torch.einsum("or,rihw->oihw", torch.cat([torch.eye(8), coeff]), basis)
    full = torch.cat([torch.eye(8, dtype=torch.float64), coeff])
    actual = gk.basis_conv2d(x, basis, full, bias, padding=1, include_basis=False)
    torch.testing.assert_close(actual, F.conv2d(x, whole, bias, padding=1))


@pytest.mark.parametrize("mask", [(m & 1, m & 2, m & 4, m & 8) for m in range(16)], ids=str)
@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_only_the_gradients_asked_for(mask: tuple[int, ...], include_basis: bool) -> None:
    shape = SHAPES[1]
    wanted = [bool(m) for m in mask]
    tensors = make(shape, torch.float32, include_basis)
    x, basis, coeff, bias = tensors
    g = random_like_output(shape, tensors, include_basis)
    z = F.conv2d(x, basis, padding=1) + (bias[:8, None, None] if include_basis else 0)
    results = OPS.basis_conv2d_backward(
        g, x, basis, coeff, z, bias[:8] if include_basis else None, [1, 1], [1, 1], [1, 1],
        include_basis, wanted,
    )  # fmt: skip
    expected = gradients(oracle, tensors, g, shape, include_basis)[1:]
    for mine, exact, asked_for in zip(results, expected, wanted, strict=True):
        assert (mine is not None) == asked_for
        if mine is not None:
            assert largest(mine, exact) <= WINOGRAD_ERROR


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_same_bits_every_time(dtype: torch.dtype, include_basis: bool, algorithm: str) -> None:
    gk.set_conv_algorithm(algorithm)
    shape = Shape((4, 32, 12, 14), 24, 48)
    tensors = make(shape, dtype, include_basis)
    g = random_like_output(shape, tensors, include_basis)
    first = gradients(ours, tensors, g, shape, include_basis)
    for _ in range(3):
        again = gradients(ours, tensors, g, shape, include_basis)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_only_regroup_the_sums(threads: int) -> None:
    shape = Shape((3, 16, 9, 10), 8, 20)
    tensors = make(shape, torch.float32)
    g = random_like_output(shape, tensors, True)
    expected = gradients(oracle, tensors, g, shape, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = gradients(ours, tensors, g, shape, True)
    finally:
        torch.set_num_threads(before)
    for mine, exact in zip(results, expected, strict=True):
        assert largest(mine, exact) <= WINOGRAD_ERROR


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", range(4), ids=["x", "basis", "coeff", "bias"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[10]], ids=str)
def test_nan_and_inf_propagate(shape: Shape, poisoned: int, value: float, algorithm: str) -> None:
    """Wherever plain torch gives no finite value, so do we; Winograd may spread it over a tile."""
    gk.set_conv_algorithm(algorithm)
    tensors = make(shape, torch.float32)
    tensors[poisoned].view(-1)[3] = value
    actual, expected = ours(tensors, shape, True), plain_torch(tensors, shape, True)
    assert not expected.isfinite().all()
    assert not actual[~expected.isfinite()].isfinite().any()
    if algorithm == "direct" and poisoned != 1:
        assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_in_the_gradient_propagates(algorithm: str) -> None:
    gk.set_conv_algorithm(algorithm)
    shape = SHAPES[1]
    tensors = make(shape, torch.float32)
    g = random_like_output(shape, tensors, True)
    g[0, 12, 3, 4] = float("nan")
    theirs = gradients(plain_torch, tensors, g, shape, True)[1:]
    for mine, plain in zip(gradients(ours, tensors, g, shape, True)[1:], theirs, strict=True):
        assert not plain.isfinite().all()
        assert not mine[~plain.isfinite()].isfinite().any()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_gradients_of_gradients(include_basis: bool, bias: bool) -> None:
    shape = Shape((2, 2, 4, 3), 2, 3, (3, 2), (2, 1), (1, 1))
    tensors = [t.requires_grad_() for t in make(shape, torch.float64, include_basis, bias)]

    def function(*arguments: Tensor) -> Tensor:
        return ours(list(arguments), shape, include_basis)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_gradients_of_the_backward_op(include_basis: bool) -> None:
    """It is differentiable by itself, z and z_bias being inputs like the others."""
    shape = Shape((2, 2, 4, 3), 2, 3)
    x, basis, coeff, bias = make(shape, torch.float64, include_basis)
    g = random_like_output(shape, [x, basis, coeff, bias], include_basis)
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
    shape = Shape((2, 2, 4, 3), 2, 3)
    tensors = [t.requires_grad_() for t in make(shape, torch.float64, False)]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = OPS.basis_conv2d_with_maps(
            *arguments, [1, 1], [1, 1], [1, 1], False
        )
        return results

    assert torch.autograd.gradcheck(function, tensors)
    y, z = function(*tensors)
    torch.testing.assert_close(y, ours(tensors, shape, False))
    torch.testing.assert_close(z, F.conv2d(tensors[0], tensors[1], padding=1))


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_output_may_be_overwritten_before_the_backward_pass(include_basis: bool) -> None:
    shape = SHAPES[1]
    tensors = make(shape, torch.float32, include_basis)
    g = random_like_output(shape, tensors, include_basis)

    def in_place(leaves: list[Tensor]) -> Tensor:
        return ours(leaves, shape, include_basis).relu_()

    def out_of_place(leaves: list[Tensor]) -> Tensor:
        return oracle(leaves, shape, include_basis).relu()

    results = gradients(in_place, tensors, g)
    for mine, exact in zip(results, gradients(out_of_place, tensors, g), strict=True):
        assert largest(mine, exact) <= WINOGRAD_ERROR


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(layout: torch.memory_format, include_basis: bool, requires_grad: bool) -> None:
    shape = Shape((2, 3, 5, 6), 2, 5)
    x, basis, coeff, bias = make(shape, torch.float32, include_basis)
    x = x.contiguous(memory_format=layout)
    g = random_like_output(shape, [x, basis, coeff, bias], include_basis)
    z = F.conv2d(x, basis, padding=1)
    for tensor in (x, basis, coeff, bias, g, z):
        tensor.requires_grad_(requires_grad)
    form = ([1, 1], [1, 1], [1, 1], include_basis)
    torch.library.opcheck(OPS.basis_conv2d.default, (x, basis, coeff, bias, *form))
    if not include_basis:
        torch.library.opcheck(OPS.basis_conv2d_with_maps.default, (x, basis, coeff, None, *form))
    for mask in ([True] * 4, [True, False, True, False]):
        torch.library.opcheck(
            OPS.basis_conv2d_backward.default, (g, x, basis, coeff, z, None, *form, mask)
        )


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_compile_without_breaks_and_with_dynamic_shapes(include_basis: bool) -> None:
    def program(x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor) -> Tensor:
        y = gk.basis_conv2d(x + 1, basis, coeff, bias, 1, 1, 1, include_basis)
        return y.relu() * 2

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    for image in ((2, 3, 8, 8), (5, 3, 7, 9)):
        tensors = make(Shape(image, 2, 5), torch.float32, include_basis)
        g = torch.randn(image[0], 5, *image[2:])
        expected = gradients(lambda leaves: program(*leaves), tensors, g)
        for mine, eager in zip(
            gradients(lambda leaves: compiled(*leaves), tensors, g), expected, strict=True
        ):
            torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


def test_export() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            _, basis, coeff, bias = make(SHAPES[0], torch.float32)
            self.basis, self.coeff, self.bias = map(torch.nn.Parameter, (basis, coeff, bias))

        def forward(self, x: Tensor) -> Tensor:
            return gk.basis_conv2d(x, self.basis, self.coeff, self.bias, padding=1)

    layer, batch = Layer(), torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_autocast_takes_what_a_convolution_would(include_basis: bool) -> None:
    shape = SHAPES[1]
    tensors = make(shape, torch.float32, include_basis)
    lowered = [t.bfloat16() for t in tensors]
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(leaves, shape, include_basis)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ours(lowered, shape, include_basis))
    g = torch.ones_like(y)
    results = torch.autograd.grad(y, leaves, g)
    expected = gradients(ours, lowered, g, shape, include_basis)[1:]
    for mine, low in zip(results, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, low.float())


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None, None), (2, None, None, None), (0, 0, 0, 0), (None, 1, None, None),
     (0, None, 0, None)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_vmap(in_dims: tuple[int | None, ...], include_basis: bool) -> None:
    shape = Shape((2, 3, 5, 6), 2, 5)
    members = [make(shape, torch.float64, include_basis, seed=seed) for seed in range(3)]
    batched = [
        members[0][i] if dim is None else torch.stack([m[i] for m in members], dim)
        for i, dim in enumerate(in_dims)
    ]

    def function(*tensors: Tensor) -> Tensor:
        return ours(list(tensors), shape, include_basis)

    actual = torch.func.vmap(function, in_dims=in_dims)(*batched)
    for index, member in enumerate(members):
        own = [members[0][i] if dim is None else member[i] for i, dim in enumerate(in_dims)]
        torch.testing.assert_close(actual[index], function(*own))


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_gradients_per_sample(include_basis: bool) -> None:
    x, basis, coeff, bias = make(Shape((4, 3, 5, 6), 2, 5), torch.float64, include_basis)

    def loss(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        image, *parameters = tensors
        return function(image[None], *parameters, 1, 1, 1, include_basis).square().sum()

    for wanted in ((1, 2, 3, 4), (1,)):
        per_sample = torch.func.vmap(
            torch.func.grad(loss, argnums=wanted), in_dims=(None, 0, None, None, None)
        )
        results = per_sample(gk.basis_conv2d, x, basis, coeff, bias)
        expected = per_sample(reference.basis_conv2d, x, basis, coeff, bias)
        for mine, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
def test_hessian(include_basis: bool) -> None:
    x, basis, coeff, bias = make(Shape((1, 2, 3, 4), 2, 4), torch.float64, include_basis)

    def hessian(function: Callable[..., Tensor]) -> Tensor:
        def loss(mixing: Tensor) -> Tensor:
            return function(x, basis, mixing, bias, 1, 1, 1, include_basis).exp().sum()

        result: Tensor = torch.func.hessian(loss)(coeff)
        return result

    torch.testing.assert_close(hessian(gk.basis_conv2d), hessian(reference.basis_conv2d))


def test_flops_are_counted() -> None:
    shape = Shape((2, 3, 6, 5), 4, 10)
    convolution, mixing = 2 * 2 * 30 * 4 * 3 * 9, 2 * 2 * 30 * 6 * 4
    tensors = [t.requires_grad_() for t in make(shape, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        y = ours(tensors, shape, True)
    assert counter.get_total_flops() == convolution + mixing
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), tensors)
    assert counter.get_total_flops() == 2 * convolution + 2 * mixing
    tensors = [t.requires_grad_() for t in make(shape, torch.float32, False)]
    with FlopCounterMode(display=False) as counter:
        y = ours(tensors, shape, False)
        torch.autograd.grad(y.sum(), tensors[1])
    assert counter.get_total_flops() == 2 * convolution + 2 * 2 * 2 * 30 * 10 * 4


@given(
    image=st.tuples(*map(st.integers, (0, 1, 1, 1), (3, 20, 14, 14))),
    channels=st.tuples(st.integers(1, 20), st.integers(0, 20)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)) | st.just((3, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.just((1, 1)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just((1, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)) | st.just((1, 1)),
    include_basis=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    algorithm=st.sampled_from(ALGORITHMS),
)
def test_any_shapes(
    image: tuple[int, int, int, int], channels: tuple[int, int], kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    include_basis: bool, channels_last: bool, dtype: torch.dtype, algorithm: str,
) -> None:  # fmt: skip
    filters, others = channels
    shape = Shape(image, filters, filters + others, kernel, stride, padding, dilation)
    tensors = make(shape, dtype, include_basis)
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    spans = [image[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
    if min(spans) < 0:
        with pytest.raises(ValueError, match="the output would be empty"):
            ours(tensors, shape, include_basis)
        return
    gk.set_conv_algorithm(algorithm)
    g = random_like_output(shape, tensors, include_basis)
    expected = gradients(oracle, tensors, g, shape, include_basis)
    tolerance = 1e-12 if dtype == torch.float64 else WINOGRAD_ERROR
    for mine, exact in zip(
        gradients(ours, tensors, g, shape, include_basis), expected, strict=True
    ):
        assert largest(mine, exact) <= tolerance


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


def test_portable_backend_and_the_setting_from_the_environment() -> None:
    environment = {
        **os.environ, "GROWKERNELS_BRGEMM": "0", "GROWKERNELS_CONV_ALGORITHM": "winograd",
    }  # fmt: skip
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


X, B, C = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 3, 3), torch.ones(4, 2)
BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no filters": ((X, B[:0], C[:, :0]), {}, ValueError, "at least one filter"),
    "more filters than channels": (
        (X, B, C[:1]), {"include_basis": False}, ValueError, "2 basis filters for 1 output",
    ),
    "coeff": ((X, B, C.T), {}, ValueError, r"coeff has shape \[2, 4\].*\[Cout - R, R\] with R = 2"),
    "coeff of the mixed form": (
        (X, B, C.T), {"include_basis": False}, ValueError, r"it needs \[Cout, R\] with R = 2",
    ),
    "coeff dimensions": ((X, B, C[0]), {}, ValueError, r"coeff has shape \[2\]"),
    "channels": ((X, B[:, :2], C), {}, ValueError, "basis has 2 input channels but x has 3"),
    "groups": ((X, B[:, :1], C), {}, ValueError, "grouped convolutions are not supported"),
    "bias": ((X, B, C, torch.ones(4)), {}, ValueError, "each of 6 output channels"),
    "bias of the mixed form": (
        (X, B, C, torch.ones(6)), {"include_basis": False}, ValueError, "each of 4 output channels",
    ),
    "bias dimensions": ((X, B, C, torch.ones(6, 1)), {}, ValueError, r"bias has shape \[6, 1\]"),
    "one image": ((X[0], B, C), {}, ValueError, r"it needs \[N, Cin, H, W\]"),
    "basis dimensions": ((X, B[0], C), {}, ValueError, r"it needs \[R, Cin, kh, kw\]"),
    "no pixels": ((X[:, :, :0], B, C), {"padding": 2}, ValueError, "only the batch may be empty"),
    "empty kernel": ((X, B[:, :, :0], C), {}, ValueError, "height and width must be at least 1"),
    "small image": ((X[..., :2], B, C), {}, ValueError, "8 x 2 pixels.*smaller than the kernel"),
    "integers": ((X.int(), B.int(), C.int()), {}, TypeError, "x has dtype Int; pass float16"),
    "complex": ((X + 0j, B + 0j, C + 0j), {}, TypeError, "x has dtype ComplexFloat"),
    "dtypes": ((X, B.double(), C), {}, TypeError, "basis has dtype Double but x has Float"),
    "coeff dtype": ((X, B, C.half()), {}, TypeError, "coeff has dtype Half but x has Float"),
    "bias dtype": ((X, B, C, torch.ones(6).half()), {}, TypeError, "bias has dtype Half"),
    "devices": ((X, B.to("meta"), C), {}, ValueError, "basis is on meta but x is on cpu"),
    "stride": ((X, B, C), {"stride": (1, 0)}, ValueError, r"stride is \[1, 0\]; it must be at lea"),
    "padding": ((X, B, C), {"padding": -1}, ValueError, r"padding is \[-1, -1\]; it must be at l"),
    "dilation": ((X, B, C), {"dilation": 0}, ValueError, "dilation is .*must be at least 1"),
    "padding by name": ((X, B, C), {"padding": "same"}, ValueError, "padding is 'same'; pass an"),
    "three strides": ((X, B, C), {"stride": (1, 1, 1)}, ValueError, "pass an int or a pair"),
}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_one_sentence(name: str, requires_grad: bool) -> None:
    tensors, options, error, message = BAD_CALLS[name]
    if requires_grad and tensors[0].is_floating_point():
        tensors = tuple(t.detach().clone().requires_grad_() for t in tensors)
    with pytest.raises(error, match=message) as caught:
        gk.basis_conv2d(*tensors, **options)
    assert len(str(caught.value).splitlines()) == 1


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
