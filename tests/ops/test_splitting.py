"""The family of splitting matrices against its oracle and against autograd."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import growkernels as gk
from growkernels.ops.splitting import reference

OPS = torch.ops.growkernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Every activation: its name, its beta, and the function itself as torch has it.
ACTIVATIONS: dict[str, tuple[str, float | None, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", None, F.gelu),
    "gelu_tanh": ("gelu_tanh", None, lambda z: F.gelu(z, approximate="tanh")),
    "silu": ("silu", None, F.silu),
    "tanh": ("tanh", None, torch.tanh),
    "sigmoid": ("sigmoid", None, torch.sigmoid),
    "softplus": ("softplus", None, F.softplus),
    "softplus beta 0.7": ("softplus", 0.7, lambda z: F.softplus(z, beta=0.7, threshold=200)),
    "relu as softplus": ("relu", 3.0, lambda z: F.softplus(z, beta=3.0, threshold=200)),
}

# (M, n, k, d): one element, odd sizes, edges of registers, several tiles and blocks of each.
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 1, 7),
    (17, 20, 2, 16),
    (300, 70, 1, 33),
    (530, 101, 1, 49),
    (270, 130, 4, 20),
    (40, 3, 1, 1100),
]

# (N, C, H, W), (n, k, kh, kw), stride, padding, dilation
CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], Any, Any, Any]] = [
    ((2, 3, 5, 6), (4, 1, 3, 3), 1, 1, 1),
    ((3, 8, 9, 7), (5, 2, 3, 2), (2, 1), (0, 2), (1, 2)),
    ((2, 4, 4, 4), (3, 1, 1, 1), 1, 0, 1),
    ((2, 4, 5, 4), (3, 1, 1, 1), 2, 1, 1),
    ((30, 16, 4, 4), (33, 1, 3, 3), 1, 1, 1),
    ((1, 2, 3, 3), (2, 3, 3, 3), 1, 0, 1),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, neurons, k, width = shape
    v = randn(neurons, k, width, dtype=dtype, seed=2)
    return (
        randn(rows, width, dtype=dtype),
        randn(rows, neurons, dtype=dtype, seed=1),
        v if k > 1 else v[:, 0],
    )


def make_conv(case: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[Any, Any, Any]]:
    (n, c, h, w), (neurons, k, kh, kw), stride, padding, dilation = case
    x = randn(n, c, h, w, dtype=dtype)
    v = randn(neurons, k, c, kh, kw, dtype=dtype, seed=2)
    output = F.conv2d(x.float(), v[:, 0].float(), None, stride, padding, dilation)
    weights = randn(*output.shape, dtype=dtype, seed=1)
    return x, weights, (v if k > 1 else v[:, 0]), (stride, padding, dilation)


def relative(actual: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / norm if norm else 0.0


def plain_torch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """What a user would write, in the dtype of the inputs."""
    vectors = v.reshape(-1, v.shape[-1])
    k = v.shape[1] if v.dim() == 3 else 1
    return (((x @ vectors.T) * w.repeat_interleave(k, 1)).T @ x).view(v.shape)


def plain_conv(x: Tensor, w: Tensor, v: Tensor, sliding: Any) -> Tensor:
    stride, padding, dilation = sliding
    filters = v.reshape(-1, *v.shape[-3:])
    products = F.conv2d(x, filters, None, *sliding) * w.repeat_interleave(
        filters.shape[0] // w.shape[1], 1
    )
    return torch.nn.grad.conv2d_weight(
        x, list(filters.shape), products, stride, padding, dilation
    ).view(v.shape)


def bound(torch_error: float, dtype: torch.dtype) -> float:
    # float64 has no finer oracle: both sides carry rounding errors of this size.
    return 2 * torch_error + torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 0.5)


# --- splitting_weight


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_is_the_second_derivative_by_autograd(name: str) -> None:
    activation, beta, function = ACTIVATIONS[name]
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    grad = randn(*z.shape, dtype=torch.float64)
    actual = gk.splitting_weight(grad, z.detach(), activation, beta=beta)
    torch.testing.assert_close(actual, grad * second, rtol=1e-9, atol=1e-12)
    oracle = reference.splitting_weight(grad, z.detach(), activation, beta=beta)
    torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_error_is_at_most_twice_plain_torch(name: str, dtype: torch.dtype) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    grad, z = randn(37, 129, dtype=dtype), 3 * randn(37, 129, dtype=dtype, seed=1)
    actual = gk.splitting_weight(grad, z, activation, beta=beta)
    assert actual.dtype == dtype
    expected = reference.splitting_weight(grad.double(), z.double(), activation, beta=beta)
    plain = reference.splitting_weight(grad, z, activation, beta=beta)
    cancelled = 1e-14 if dtype == torch.float64 else 0  # what the oracle itself loses
    assert relative(actual, expected) <= bound(relative(plain, expected), dtype) + cancelled


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_keeps_layout_and_takes_any_strides(name: str) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    z = randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    grad = randn(2, 5, 4, 3, seed=1).transpose(2, 3)
    actual = gk.splitting_weight(grad, z, activation, beta=beta)
    assert actual.stride() == z.stride()
    plain = gk.splitting_weight(grad.contiguous(), z.contiguous(), activation, beta=beta)
    torch.testing.assert_close(actual, plain)
    rows = randn(7, 6)[:, ::2]
    expanded = randn(1, 3, seed=1).expand(7, 3)
    torch.testing.assert_close(
        gk.splitting_weight(expanded, rows, activation, beta=beta),
        reference.splitting_weight(expanded, rows, activation, beta=beta),
        rtol=1e-5,
        atol=1e-6,
    )
    assert gk.splitting_weight(
        torch.empty(0, 3), torch.empty(0, 3), activation, beta=beta
    ).shape == (0, 3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_in_the_tails(name: str) -> None:
    """Curvature dies out on both sides: tiny values come out tiny, with the right relative size."""
    activation, beta, _ = ACTIVATIONS[name]
    z = torch.tensor([-1e4, -200.0, -60.0, -11.0, 11.0, 60.0, 200.0, 1e4, float("nan")])
    actual = gk.splitting_weight(torch.ones(9), z, activation, beta=beta)
    assert actual[-1].isnan()
    assert (actual[[0, 7]] == 0).all()
    # 1 - sigmoid cancels for large z; its mirror image does not.
    exact = z.double()
    mirrored = reference.second_derivative(-exact.abs(), activation, beta)
    even = activation in ("gelu", "gelu_tanh", "silu", "softplus", "relu")
    expected = mirrored if even else mirrored * -exact.sign()
    if (
        activation != "gelu_tanh" and activation != "tanh"
    ):  # the oracle itself cancels in their tails
        torch.testing.assert_close(actual[:-1], expected[:-1].float(), rtol=2e-4, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_of_huge_preactivations_is_zero(name: str, dtype: torch.dtype) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    largest = torch.finfo(dtype).max
    z = torch.tensor([-largest, -torch.inf, torch.inf, largest], dtype=dtype).repeat(16)
    grad = torch.ones_like(z).requires_grad_()
    for preact in (z, z.clone().requires_grad_()):
        weight = gk.splitting_weight(grad, preact, activation, beta=beta)
        assert weight.eq(0).all()
    for gradient in torch.autograd.grad(weight.sum(), (grad, preact)):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weight_gradients_of_gradients(name: str) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    grad, z = (randn(3, 4, dtype=torch.float64, seed=s).requires_grad_() for s in (0, 1))

    def weight(grad: Tensor, z: Tensor) -> Tensor:
        return gk.splitting_weight(grad, z, activation, beta=beta)

    assert torch.autograd.gradcheck(weight, (grad, z))
    assert torch.autograd.gradgradcheck(weight, (grad, z))


# --- the mathematics, from a network that exists


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_is_the_hessian_of_a_split_by_double_backward(name: str) -> None:
    """Wu et al.: halving a neuron, its copies moved by +d and -d, changes the loss by d^T S d / 2.

    The loss after the split is differentiated twice at d = 0 by autograd, for every neuron.
    """
    activation, beta, function = ACTIVATIONS[name]
    samples, width, neurons = 6, 4, 3
    x = randn(samples, width, dtype=torch.float64)
    weight = randn(neurons, width, dtype=torch.float64, seed=1)
    outer = randn(2, neurons, dtype=torch.float64, seed=2)
    target = randn(samples, 2, dtype=torch.float64, seed=3)

    def loss(activations: Tensor) -> Tensor:
        return (torch.tanh(activations @ outer.T) - target).square().sum()

    def split(d: Tensor) -> Tensor:
        return loss((function(x @ (weight + d).T) + function(x @ (weight - d).T)) / 2)

    v = randn(neurons, width, dtype=torch.float64, seed=4)
    d = torch.zeros_like(weight).requires_grad_()
    (slope,) = torch.autograd.grad(split(d), d, create_graph=True)
    rows = [
        torch.autograd.grad((slope[i] * v[i]).sum(), d, retain_graph=True)[0][i]
        for i in range(neurons)
    ]
    expected = torch.stack(rows)

    preact = x @ weight.T
    hidden = function(preact).requires_grad_()
    (grad,) = torch.autograd.grad(loss(hidden), hidden)
    w = gk.splitting_weight(grad, preact, activation, beta=beta)
    torch.testing.assert_close(gk.splitting_hvp(x, w, v), expected, rtol=1e-9, atol=1e-10)


def test_conv_is_the_gradient_of_a_dummy_parameter() -> None:
    """S_i as S2D's authors get it: dL/dV of act''(z) p^T V p added to the neuron's output."""
    x, w, v, sliding = make_conv(CONVOLUTIONS[1], torch.float64)
    columns = F.unfold(x, v.shape[-2:], dilation=(1, 2), padding=(0, 2), stride=(2, 1))  # [N, D, L]
    for neuron in range(v.shape[0]):
        V = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64).requires_grad_()
        term = torch.einsum("nal,ab,nbl->nl", columns, V, columns)
        (S,) = torch.autograd.grad((term * w[:, neuron].flatten(1)).sum(), V)
        expected = (v[neuron].flatten(1) @ S).view(v[neuron].shape)
        actual = gk.splitting_hvp_conv2d(x, w, v, *sliding)[neuron]
        torch.testing.assert_close(actual, expected)


# --- splitting_hvp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_plain_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x, w, v = make(shape, dtype)
    actual = gk.splitting_hvp(x, w, v)
    assert actual.dtype == dtype
    assert actual.shape == v.shape
    assert actual.is_contiguous()
    expected = reference.splitting_hvp(x.double(), w.double(), v.double())
    assert relative(actual, expected) <= bound(relative(plain_torch(x, w, v), expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv_error_is_at_most_twice_plain_torch(case: Any, dtype: torch.dtype) -> None:
    x, w, v, sliding = make_conv(case, dtype)
    actual = gk.splitting_hvp_conv2d(x, w, v, *sliding)
    assert actual.dtype == dtype
    assert actual.shape == v.shape
    assert actual.is_contiguous()
    expected = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), *sliding)
    torch_error = relative(plain_conv(x, w, v, sliding), expected)
    assert relative(actual, expected) <= bound(torch_error, dtype)


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "rows padded": lambda t: F.pad(t, (0, 3))[..., :-3],
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
        "every other element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda t: t[:1].expand(t.shape),
        "channels_last": lambda t: (
            t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        ),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strides_do_not_matter(layout: str, dtype: torch.dtype) -> None:
    arrange = layouts()[layout]
    tolerance = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 2e-5, "atol": 1e-3}
    )
    for shape in SHAPES[1:5]:
        tensors = [arrange(t) for t in make(shape, dtype)]
        plain = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        torch.testing.assert_close(
            gk.splitting_hvp(*tensors), gk.splitting_hvp(*plain), **tolerance
        )
    for case in CONVOLUTIONS:
        *inputs, sliding = make_conv(case, dtype)
        tensors = [arrange(t) for t in inputs]
        plain = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        torch.testing.assert_close(
            gk.splitting_hvp_conv2d(*tensors, *sliding),
            gk.splitting_hvp_conv2d(*plain, *sliding),
            **tolerance,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("x", "w", "v"),
    [
        ((0, 4), (0, 3), (3, 4)),
        ((5, 0), (5, 3), (3, 0)),
        ((5, 4), (5, 0), (0, 4)),
        ((5, 4), (5, 3), (3, 0, 4)),
        ((0, 0), (0, 0), (0, 2, 0)),
    ],
)
def test_zero_sizes(
    x: tuple[int, ...], w: tuple[int, ...], v: tuple[int, ...], dtype: torch.dtype
) -> None:
    y = gk.splitting_hvp(*(torch.ones(s, dtype=dtype) for s in (x, w, v)))
    assert y.shape == v
    assert (y == 0).all()


def test_zero_sizes_of_images() -> None:
    y = gk.splitting_hvp_conv2d(
        torch.ones(0, 2, 4, 4), torch.ones(0, 3, 2, 2), torch.ones(3, 2, 3, 3)
    )
    assert y.eq(0).all()
    y = gk.splitting_hvp_conv2d(
        torch.ones(1, 0, 4, 4), torch.ones(1, 3, 2, 2), torch.ones(3, 0, 3, 3)
    )
    assert y.shape == (3, 0, 3, 3)
    y = gk.splitting_hvp_conv2d(
        torch.ones(1, 2, 4, 4), torch.ones(1, 0, 2, 2), torch.ones(0, 2, 3, 3)
    )
    assert y.shape == (0, 2, 3, 3)


def test_several_vectors_equal_one_after_the_other() -> None:
    x, w, v = make((700, 90, 3, 40), torch.float64)
    together = gk.splitting_hvp(x, w, v)
    for q in range(3):
        torch.testing.assert_close(together[:, q], gk.splitting_hvp(x, w, v[:, q]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for shape in ((3000, 40, 1, 64), (600, 700, 1, 40)):
                inputs = make(shape, dtype)
                first = gk.splitting_hvp(*inputs)
                assert all(torch.equal(first, gk.splitting_hvp(*inputs)) for _ in range(4))
            *images, sliding = make_conv(CONVOLUTIONS[4], dtype)
            first = gk.splitting_hvp_conv2d(*images, *sliding)
            assert torch.equal(first, gk.splitting_hvp_conv2d(*images, *sliding))
    finally:
        torch.set_num_threads(threads)


def test_threads_only_regroup_the_sums() -> None:
    threads = torch.get_num_threads()
    for shape in ((3000, 40, 1, 64), (600, 700, 1, 40)):
        x, w, v = make(shape, torch.float64)
        expected = reference.splitting_hvp(x, w, v)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                torch.testing.assert_close(
                    gk.splitting_hvp(x, w, v), expected, rtol=1e-10, atol=1e-9
                )
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nan_and_inf_propagate(dtype: torch.dtype, value: float, poisoned: int) -> None:
    tensors = make((30, 19, 1, 21), dtype)
    tensors[poisoned][3, 5] = value
    y = gk.splitting_hvp(*tensors)
    if poisoned == 0:  # row 3 enters every sum; some elements may be inf rather than NaN
        assert not y.isfinite().any()
    else:
        neuron = 5 if poisoned == 1 else 3
        assert not y[neuron].isfinite().any()
        assert y[:neuron].isfinite().all()
        assert y[neuron + 1 :].isfinite().all()


@given(
    rows=st.integers(0, 70),
    neurons=st.integers(0, 40),
    k=st.integers(1, 3),
    width=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shapes(rows: int, neurons: int, k: int, width: int, dtype: torch.dtype) -> None:
    x, w, v = make((rows, neurons, k, width), dtype)
    expected = reference.splitting_hvp(x.double(), w.double(), v.double())
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.02)
    assert relative(gk.splitting_hvp(x, w, v), expected) <= tolerance


# --- what surrounds the kernels


def calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """One small call of each product, with tensors in float64."""
    x, w, v = make((5, 3, 1, 4), torch.float64)
    several = make((4, 2, 3, 2), torch.float64)
    *images, sliding = make_conv(CONVOLUTIONS[5], torch.float64)
    *plain, _ = make_conv(((2, 2, 4, 3), (2, 1, 3, 2), (2, 1), (1, 0), 1), torch.float64)
    return {
        "hvp": (gk.splitting_hvp, [x, w, v]),
        "hvp of several": (gk.splitting_hvp, list(several)),
        "conv2d of several": (lambda x, w, v: gk.splitting_hvp_conv2d(x, w, v, *sliding), images),
        "conv2d": (lambda x, w, v: gk.splitting_hvp_conv2d(x, w, v, (2, 1), (1, 0)), plain),
    }


@pytest.mark.parametrize("name", calls())
def test_gradients_of_gradients(name: str) -> None:
    function, tensors = calls()[name]
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", calls())
def test_functional_gradients(name: str) -> None:
    function, tensors = calls()[name]

    def loss(*inputs: Tensor) -> Tensor:
        return function(*inputs).sin().sum()

    wanted = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*wanted), wanted)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*tensors), expected)
    vectors = torch.stack([tensors[2], 2 * tensors[2]])
    each = torch.func.vmap(torch.func.grad(loss, 2), in_dims=(None, None, 0))
    torch.testing.assert_close(each(*tensors[:2], vectors)[0], expected[2])


def test_functional_gradients_of_the_weight() -> None:
    grad, z = (randn(4, 3, dtype=torch.float64, seed=seed) for seed in (0, 1))

    def loss(grad: Tensor, z: Tensor) -> Tensor:
        return gk.splitting_weight(grad, z, "silu").sin().sum()

    wanted = [t.clone().requires_grad_() for t in (grad, z)]
    expected = torch.autograd.grad(loss(*wanted), wanted)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(grad, z), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_every_gradient_against_the_oracle(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = make(shape, dtype)
    ours = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.double().requires_grad_() for t in inputs]
    gk.splitting_hvp(*ours).float().sin().sum().backward()
    y = reference.splitting_hvp(*theirs)
    y.backward(gk.splitting_hvp(*inputs).double().cos())
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert actual.grad.dtype == dtype
        assert relative(actual.grad, expected.grad) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype: torch.dtype, requires_grad: bool) -> None:
    tolerances = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    tensors = [t.requires_grad_(requires_grad) for t in make((9, 4, 2, 6), dtype)]
    torch.library.opcheck(OPS.splitting_hvp.default, tuple(tensors), **tolerances)
    *images, _ = make_conv(((2, 3, 5, 6), (4, 1, 3, 3), 1, 1, 1), dtype)
    images[0] = images[0].contiguous(memory_format=torch.channels_last)
    images = [t.requires_grad_(requires_grad) for t in images]
    torch.library.opcheck(
        OPS.splitting_hvp_conv2d.default, (*images, [1, 1], [1, 1], [1, 1]), **tolerances
    )
    pair = [randn(3, 5, dtype=dtype, seed=s).requires_grad_(requires_grad) for s in (0, 1)]
    torch.library.opcheck(OPS.splitting_weight.default, (*pair, "silu", None), **tolerances)


def test_compile_without_breaks_and_with_dynamic_shapes() -> None:
    def program(x: Tensor, z: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return gk.splitting_hvp(x, gk.splitting_weight(g, z, "gelu"), v) * 2

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    for rows in (4, 9, 30):
        x, g, v = make((rows, 3, 1, 5), torch.float32)
        z = randn(rows, 3, seed=7)
        torch.testing.assert_close(compiled(x, z, g, v), program(x, z, g, v))
    v.requires_grad_()
    (expected,) = torch.autograd.grad(program(x, z, g, v).sum(), v)
    (actual,) = torch.autograd.grad(compiled(x, z, g, v).sum(), v)
    torch.testing.assert_close(actual, expected)


def test_export() -> None:
    class Products(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
            return gk.splitting_hvp(x, w, v)

    rows = torch.export.Dim("rows")
    program = torch.export.export(
        Products(), make((8, 3, 1, 5), torch.float32), dynamic_shapes=({0: rows}, {0: rows}, None)
    )
    inputs = make((20, 3, 1, 5), torch.float32)
    torch.testing.assert_close(program.module()(*inputs), Products()(*inputs))


def test_autocast_takes_what_a_product_would() -> None:
    x, w, v = make((64, 8, 1, 24), torch.float32)
    lowered = [t.bfloat16() for t in (x, w, v)]
    *images, sliding = make_conv(CONVOLUTIONS[0], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gk.splitting_hvp(x, w.bfloat16(), v)
        conv = gk.splitting_hvp_conv2d(*images, *sliding)
        weight = gk.splitting_weight(w, w.bfloat16())
    assert torch.equal(y, gk.splitting_hvp(*lowered))
    assert torch.equal(conv, gk.splitting_hvp_conv2d(*(t.bfloat16() for t in images), *sliding))
    assert torch.equal(weight, gk.splitting_weight(w, w.bfloat16().float()))


@pytest.mark.parametrize(
    "in_dims",
    [(0, 0, 0), (None, None, 0), (None, 0, 0), (None, 0, None), (0, None, None), (1, 2, 1)],
)
@pytest.mark.parametrize("name", calls())
def test_vmap(name: str, in_dims: tuple[int | None, ...]) -> None:
    function, tensors = calls()[name]
    batch = [torch.stack([t, 2 * t.flip(0), t.sin()]) for t in tensors]
    arguments = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(batch, in_dims, strict=True)
    ]
    actual = torch.func.vmap(function, in_dims=in_dims)(*arguments)
    for i in range(3):
        one = [t[0 if dim is None else i] for t, dim in zip(batch, in_dims, strict=True)]
        torch.testing.assert_close(actual[i], function(*one))


def test_vmap_of_weights() -> None:
    grad, z = randn(4, 3, 5), randn(3, 5, 4, seed=1)
    actual = torch.func.vmap(gk.splitting_weight, in_dims=(0, 2))(grad, z)
    torch.testing.assert_close(actual, gk.splitting_weight(grad, z.movedim(2, 0)))


def test_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        gk.splitting_hvp(*make((10, 3, 2, 4), torch.float32))
    assert counter.get_total_flops() == 4 * 10 * 3 * 2 * 4
    *images, sliding = make_conv(CONVOLUTIONS[0], torch.float32)
    with FlopCounterMode(display=False) as counter:
        gk.splitting_hvp_conv2d(*images, *sliding)
    assert counter.get_total_flops() == 4 * 2 * 5 * 6 * 4 * 3 * 3 * 3


def test_composed_form_for_other_devices() -> None:
    """What runs on devices without kernels of their own, called in place of the CPU's kernels."""
    composed = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    for dtype in (torch.float32, torch.bfloat16):
        tolerance = 2e-2 if dtype.itemsize == 2 else 1e-6
        for shape in SHAPES[:4]:
            inputs = make(shape, dtype)
            y = OPS.splitting_hvp.default.redispatch(composed, *inputs)
            assert relative(y, gk.splitting_hvp(*inputs)) <= tolerance
        for case in CONVOLUTIONS:
            *images, sliding = make_conv(case, dtype)
            pairs = [[s, s] if isinstance(s, int) else list(s) for s in sliding]
            y = OPS.splitting_hvp_conv2d.default.redispatch(composed, *images, *pairs)
            assert relative(y, gk.splitting_hvp_conv2d(*images, *sliding)) <= tolerance
        grad, z = randn(4, 5, dtype=dtype), randn(4, 5, dtype=dtype, seed=1)
        w = OPS.splitting_weight.default.redispatch(composed, grad, z, "relu", 3.0)
        assert relative(w, gk.splitting_weight(grad, z, "relu", beta=3.0)) <= tolerance


BACKEND_PROGRAM = """
import torch
import growkernels as gk
from growkernels.ops.backends import choose_backend
from growkernels.ops.splitting import reference
assert choose_backend("splitting_hvp", "cpu", torch.bfloat16).backend == "portable"
generator = torch.Generator().manual_seed(0)
def randn(*shape):
    return torch.randn(shape, generator=generator)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-14)):
    for rows, n, d in ((450, 7, 5), (300, 131, 61), (129, 40, 401)):
        tensors = [t.to(dtype) for t in (randn(rows, d), randn(rows, n), randn(n, d))]
        y = gk.splitting_hvp(*tensors)
        expected = reference.splitting_hvp(*map(torch.Tensor.double, tensors))
        assert (y - expected).norm() <= tolerance * expected.norm(), (dtype, rows)
    tensors = [t.to(dtype) for t in (randn(3, 4, 6, 5), randn(3, 5, 6, 5), randn(5, 4, 3, 3))]
    y = gk.splitting_hvp_conv2d(*tensors, padding=1)
    expected = reference.splitting_hvp_conv2d(*map(torch.Tensor.double, tensors), padding=1)
    assert (y - expected).norm() <= tolerance * expected.norm(), dtype
"""


def test_portable_backend() -> None:
    environment = {**os.environ, "GROWKERNELS_BRGEMM": "0"}
    subprocess.run([sys.executable, "-c", BACKEND_PROGRAM], env=environment, check=True)


def test_extra_memory_is_the_output_and_little_more() -> None:
    """The [M, n] product would take 512 MiB here."""
    program = """
import resource, torch, growkernels as gk
x, w, v = torch.ones(32768, 8), torch.ones(1, 1).expand(32768, 4096), torch.ones(4096, 8)
gk.splitting_hvp(x[:64], w[:64], v)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gk.splitting_hvp(x, w, v)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 64 * 1024, grown
"""
    subprocess.run([sys.executable, "-c", program], check=True)


hvp, conv2d, weight = gk.splitting_hvp, gk.splitting_hvp_conv2d, gk.splitting_weight
X, W, V = torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 3)
IMAGES, OUTPUT, FILTERS = torch.ones(1, 2, 5, 5), torch.ones(1, 3, 3, 3), torch.ones(3, 2, 3, 3)
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rows": (lambda: hvp(X, W[:3], V), ValueError, "w has 3 rows but x has 4"),
    "neurons": (lambda: hvp(X, W, V[:1]), ValueError, "vectors for 1 neurons but w has 2"),
    "length": (lambda: hvp(X, W, V[:, :2]), ValueError, "vectors of length 2 but x has"),
    "x's dimensions": (lambda: hvp(X[None], W, V), ValueError, r"needs \[M, d\]"),
    "w's dimensions": (lambda: hvp(X, W[0], V), ValueError, r"needs \[M, n\]"),
    "v's dimensions": (lambda: hvp(X, W, V[0]), ValueError, r"needs \[n, d\]"),
    "integers": (lambda: hvp(X.int(), W, V), TypeError, "x has dtype Int"),
    "dtypes": (lambda: hvp(X, W.double(), V), TypeError, "w has dtype Double but x"),
    "devices": (lambda: hvp(X, W, V.to("meta")), ValueError, "v is on meta but x"),
    "images": (lambda: conv2d(IMAGES[0], OUTPUT, FILTERS), ValueError, r"needs \[N, C, H, W\]"),
    "output": (lambda: conv2d(IMAGES, OUTPUT[0], FILTERS), ValueError, r"needs \[N, n, Ho, Wo\]"),
    "filters": (lambda: conv2d(IMAGES, OUTPUT, FILTERS[0]), ValueError, r"needs \[n, C, kh, kw\]"),
    "batch": (
        lambda: conv2d(IMAGES, OUTPUT[:0], FILTERS),
        ValueError,
        "w has 0 images but x has 1",
    ),
    "channels": (
        lambda: conv2d(IMAGES, OUTPUT, FILTERS[:, :1]),
        ValueError,
        "filters of 1 channels",
    ),
    "conv neurons": (
        lambda: conv2d(IMAGES, OUTPUT, FILTERS[:2]),
        ValueError,
        "filters for 2 neurons",
    ),
    "output size": (
        lambda: conv2d(IMAGES, OUTPUT, FILTERS, padding=1),
        ValueError,
        "output has size 5 along dimension 2",
    ),
    "filter too large": (
        lambda: conv2d(IMAGES, OUTPUT, FILTERS, dilation=3),
        ValueError,
        "does not fit into a padded image of size 5",
    ),
    "no taps": (lambda: conv2d(IMAGES, OUTPUT, FILTERS[..., :0]), ValueError, "at least one tap"),
    "stride": (lambda: conv2d(IMAGES, OUTPUT, FILTERS, 0), ValueError, "stride must be at least 1"),
    "padding": (
        lambda: conv2d(IMAGES, OUTPUT, FILTERS, 1, -1),
        ValueError,
        "padding must be at least 0",
    ),
    "three strides": (
        lambda: conv2d(IMAGES, OUTPUT, FILTERS, (1, 1, 1)),  # type: ignore[arg-type]
        ValueError,
        r"stride is \(1, 1, 1\); pass an int or a pair of ints",
    ),
    "fractional stride": (
        lambda: conv2d(IMAGES, OUTPUT, FILTERS, (1.5, 1)),  # type: ignore[arg-type]
        ValueError,
        "pass an int or a pair of ints",
    ),
    "activation": (lambda: weight(X, X, "swish"), ValueError, "unknown activation 'swish'"),
    "relu": (lambda: weight(X, X, "relu"), ValueError, "ReLU's second derivative is zero"),
    "beta not wanted": (lambda: weight(X, X, beta=1.0), ValueError, "'gelu' takes none"),
    "beta": (lambda: weight(X, X, "relu", beta=0.0), ValueError, "beta must be positive"),
    "nan beta": (lambda: weight(X, X, "relu", beta=math.nan), ValueError, "positive and finite"),
    "weight shapes": (lambda: weight(X, X[:3]), ValueError, "they must be equal"),
    "weight dtypes": (lambda: weight(X, X.half()), TypeError, "cast them to one dtype"),
    "weight integers": (lambda: weight(X.int(), X.int()), TypeError, "preact has dtype Int"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_one_sentence(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
