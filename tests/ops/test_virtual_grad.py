"""virtual_grads and virtual_grad_norms against the oracle, and against layers that really exist."""

from __future__ import annotations

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
from growkernels.ops.virtual_grad import reference

OPS = torch.ops.growkernels
KINDS = [
    ("linear_relu", "tanh", 1.0),
    ("residual", "tanh", 0.8),
    ("residual", "relu", 1.0),
    ("residual", "gelu", 1.3),
    ("residual", "silu", 1.0),
    ("residual", "sigmoid", -0.5),
    ("conv2d_relu", "tanh", 1.0),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Ragged widths on purpose: one register, one vector and a bit, several tiles of G and of samples.
LINEAR_SHAPES = [(450, 5), (1, 1), (7, 16), (129, 33), (3, 4, 20), (50, 401), (4100, 9)]
CONV_SHAPES = [(2, 3, 5, 5), (1, 4, 1, 1), (3, 16, 8, 6)]


def shapes_of(layer: str) -> list[tuple[int, ...]]:
    return CONV_SHAPES if layer == "conv2d_relu" else LINEAR_SHAPES


def make(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    grads = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return inputs, grads


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def relative(actual: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / norm if norm else 0.0


def plain_torch(h: Tensor, g: Tensor, layer: str, activation: str, scale: float) -> Tensor:
    """What a user would write, in the dtype of the inputs."""
    masked = torch.where(h > 0, g, 0)
    if layer == "conv2d_relu":
        size = (h.shape[1], h.shape[1], 3, 3)
        return torch.nn.grad.conv2d_weight(h, size, masked, padding=1)
    rows, grad_rows = h.flatten(0, -2), g.flatten(0, -2)
    if layer == "linear_relu":
        return masked.flatten(0, -2).T @ rows
    return grad_rows.T @ reference.ACTIVATIONS[activation](scale * rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer", "activation", "scale"), KINDS)
def test_error_is_at_most_twice_plain_torch(
    layer: str, activation: str, scale: float, dtype: torch.dtype
) -> None:
    inputs, grads = make(shapes_of(layer), dtype)
    params: dict[str, Any] = {"activation": activation, "scale": scale}
    actual = gk.virtual_grads(inputs, grads, layer, **params)
    norms = gk.virtual_grad_norms(inputs, grads, layer, **params)
    oracle = reference.virtual_grads(exact(inputs), exact(grads), layer, **params)
    for h, g, ours, expected, norm in zip(inputs, grads, actual, oracle, norms, strict=True):
        assert ours.dtype == norms.dtype == (torch.float64 if dtype.itemsize == 8 else torch.float)
        assert ours.is_contiguous()
        torch_error = relative(plain_torch(h, g, layer, activation, scale), expected)
        # float64 has no finer oracle: both sides carry rounding errors of this size.
        rounding = torch.finfo(ours.dtype).eps * (16 if dtype == torch.float64 else 1)
        # sigma(s h) is a bfloat16 operand: one rounding, which few samples need not average out.
        operand = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 and h.numel() < 20 else 0
        assert relative(ours, expected) <= 2 * torch_error + 4 * rounding + operand
        assert norm.item() == pytest.approx(
            expected.square().sum().item(), rel=8 * torch_error + 8 * rounding + 2 * operand
        )


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "rows padded": lambda t: F.pad(t, (0, 3))[..., :-3],
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
        "channels_last": lambda t: (
            t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        ),
        "expanded": lambda t: t[:1].expand(t.shape),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(layer: str, layout: str, dtype: torch.dtype) -> None:
    inputs, grads = make(shapes_of(layer), dtype)
    arrange = layouts()[layout]
    inputs, grads = [arrange(h) for h in inputs], [arrange(g) for g in grads]
    actual = gk.virtual_grads(inputs, grads, layer)
    plain = gk.virtual_grads(
        [h.clone(memory_format=torch.contiguous_format) for h in inputs],
        [g.clone(memory_format=torch.contiguous_format) for g in grads],
        layer,
    )
    for ours, expected in zip(actual, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0, 0), (2, 3, 0), (2, 0, 4)])
@pytest.mark.parametrize("layer", ["linear_relu", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_sizes(layer: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    empty = torch.empty(shape, dtype=dtype)
    full = torch.ones(3, 2, dtype=dtype)
    gradients = gk.virtual_grads([empty, full], [empty, full], layer)
    assert gradients[0].shape == (shape[-1], shape[-1])
    assert (gradients[0] == 0).all()
    norms = gk.virtual_grad_norms([empty, full], [empty, full], layer)
    assert norms[0] == 0
    assert norms[1] > 0


def test_no_images() -> None:
    empty = torch.empty(0, 4, 6, 6)
    assert gk.virtual_grads([empty], [empty], "conv2d_relu")[0].eq(0).all()


@pytest.mark.parametrize(("layer", "activation", "scale"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_over_batches(
    layer: str, activation: str, scale: float, dtype: torch.dtype
) -> None:
    params: dict[str, Any] = {"activation": activation, "scale": scale}
    batches = [make(shapes_of(layer), dtype, seed) for seed in range(3)]
    single = [gk.virtual_grads(h, g, layer, **params) for h, g in batches]
    sums = [torch.zeros_like(G) for G in single[0]]
    moments = torch.zeros(len(sums))
    for inputs, grads in batches:
        norms = gk.virtual_grad_norms(inputs, grads, layer, sums, second_moments=moments, **params)
    for position, total in enumerate(sums):
        expected = torch.stack([G[position] for G in single]).double()
        torch.testing.assert_close(total.double(), expected.sum(0), rtol=1e-5, atol=1e-4)
        assert norms[position].item() == pytest.approx(
            total.double().square().sum().item(), rel=1e-5
        )
        assert moments[position].item() == pytest.approx(expected.square().sum().item(), rel=1e-5)


def test_out_is_added_to_and_returned() -> None:
    inputs, grads = make([(6, 4)], torch.float32)
    out = [torch.ones(4, 4)]
    version = out[0]._version
    result = gk.virtual_grads(inputs, grads, "linear_relu", out)
    assert result[0] is out[0]
    assert out[0]._version > version
    torch.testing.assert_close(out[0], 1 + gk.virtual_grads(inputs, grads, "linear_relu")[0])


@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
def test_equals_the_gradient_of_a_layer_that_exists(layer: str) -> None:
    """An identity layer put behind h, its weight's gradient by autograd: the definition itself."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 3, 5, 6) if layer == "conv2d_relu" else (10, 4)
    h = torch.randn(shape, generator=generator, dtype=torch.float64)
    h = h if layer == "residual" else h.relu()
    head = torch.randn(shape, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (head * x.sin()).sum()

    if layer == "conv2d_relu":
        weight = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
        weight[:, :, 1, 1] = torch.eye(3)
        out = F.relu(F.conv2d(h, weight.requires_grad_(), padding=1))
    elif layer == "linear_relu":
        weight = torch.eye(4, dtype=torch.float64).requires_grad_()
        out = F.relu(h @ weight.T)
    else:
        weight = torch.zeros(4, 4, dtype=torch.float64).requires_grad_()
        out = h + torch.tanh(0.8 * h) @ weight.T
    (expected,) = torch.autograd.grad(loss(out), weight)

    leaf = h.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    actual = gk.virtual_grads([h], [grad], layer, scale=0.8 if layer == "residual" else 1.0)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
def test_same_bits_every_time(layer: str, dtype: torch.dtype) -> None:
    shapes = [(4, 64, 16, 16)] if layer == "conv2d_relu" else [(9000, 64), (700, 500), (30, 5)]
    inputs, grads = make(shapes, dtype)
    first = gk.virtual_grads(inputs, grads, layer)
    norms = gk.virtual_grad_norms(inputs, grads, layer)
    for _ in range(5):
        again = gk.virtual_grads(inputs, grads, layer)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(norms, gk.virtual_grad_norms(inputs, grads, layer))


@pytest.mark.parametrize("layer", ["linear_relu", "residual"])
def test_threads_only_regroup_the_sums(layer: str) -> None:
    inputs, grads = make([(9000, 64), (700, 500)], torch.float64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gk.virtual_grads(inputs, grads, layer))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_tanh_is_accurate_where_it_is_hard() -> None:
    x = torch.cat([torch.logspace(-38, 1.1, 2000), -torch.logspace(-38, 1.1, 2000), torch.zeros(2)])
    for dtype in (torch.float32, torch.float64):
        h = x.to(dtype)[None]
        g = torch.zeros_like(h)
        g[0, 0] = 1  # so that the first row of G is tanh(h)
        actual = gk.virtual_grads([h], [g], "residual")[0][0]
        torch.testing.assert_close(
            actual, torch.tanh(h[0]), rtol=4 * torch.finfo(dtype).eps, atol=0
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(layer: str, dtype: torch.dtype, value: float) -> None:
    for poisoned in ("inputs", "grads"):
        inputs, grads = make(shapes_of(layer)[-1:], dtype)
        inputs[0].abs_()
        (inputs if poisoned == "inputs" else grads)[0].view(-1)[7] = value
        if layer == "residual" and poisoned == "inputs" and value == float("inf"):
            continue  # tanh(inf) = 1
        assert not gk.virtual_grad_norms(inputs, grads, layer).isfinite().any()


@pytest.mark.parametrize(("layer", "activation", "scale"), KINDS)
def test_gradients_of_gradients(layer: str, activation: str, scale: float) -> None:
    shapes = [(2, 2, 3, 3)] if layer == "conv2d_relu" else [(5, 3), (4, 2)]
    inputs, grads = make(shapes, torch.float64)
    tensors = [t.requires_grad_() for t in inputs + grads]
    count = len(inputs)

    def norms(*t: Tensor) -> Tensor:
        return gk.virtual_grad_norms(
            t[:count], t[count:], layer, activation=activation, scale=scale
        )

    def gradients(*t: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            gk.virtual_grads(t[:count], t[count:], layer, activation=activation, scale=scale)
        )

    for function in (norms, gradients):
        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
def test_functional_gradients(layer: str) -> None:
    inputs, grads = make(shapes_of(layer)[:2], torch.float64)

    def loss(h: list[Tensor], g: list[Tensor]) -> Tensor:
        squares = [G.square().sum() for G in gk.virtual_grads(h, g, layer)]
        return gk.virtual_grad_norms(h, g, layer).sin().sum() + sum(squares)

    wanted = [t.clone().requires_grad_() for t in inputs + grads]
    expected = torch.autograd.grad(loss(wanted[:2], wanted[2:]), wanted)
    of_inputs, of_grads = torch.func.grad(loss, (0, 1))(inputs, grads)
    torch.testing.assert_close([*of_inputs, *of_grads], list(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("layer", "activation", "scale"), KINDS)
def test_every_gradient_against_the_oracle(
    layer: str, activation: str, scale: float, dtype: torch.dtype
) -> None:
    inputs, grads = make(shapes_of(layer)[:3], dtype)
    params: dict[str, Any] = {"activation": activation, "scale": scale}
    ours = [t.clone().requires_grad_() for t in inputs + grads]
    theirs = [t.double().requires_grad_() for t in inputs + grads]
    count = len(inputs)
    weights = torch.linspace(0.5, 1.5, count)
    (weights * gk.virtual_grad_norms(ours[:count], ours[count:], layer, **params)).sum().backward()
    oracle = reference.virtual_grad_norms(theirs[:count], theirs[count:], layer, **params)
    (weights * oracle).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert actual.grad.dtype == dtype
        assert relative(actual.grad, expected.grad) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(layer: str, dtype: torch.dtype, requires_grad: bool) -> None:
    inputs, grads = make(shapes_of(layer)[:2], dtype)
    if layer == "conv2d_relu":
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    tensors = [t.requires_grad_(requires_grad) for t in inputs + grads]
    arguments = (tensors[:2], tensors[2:], layer, "tanh", 0.8)
    tolerances = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(OPS.virtual_grads.default, arguments, **tolerances)
    torch.library.opcheck(OPS.virtual_grad_norms.default, arguments, **tolerances)
    if not requires_grad:
        sums = [torch.zeros_like(G) for G in gk.virtual_grads(inputs, grads, layer)]
        moments = torch.zeros(2, dtype=sums[0].dtype)
        torch.library.opcheck(
            OPS.accumulate_virtual_grads.default, (*arguments, sums, moments), **tolerances
        )


@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
def test_compile_without_breaks_and_with_dynamic_shapes(layer: str) -> None:
    def program(h: Tensor, g: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        norms = gk.virtual_grad_norms([h, h + 1], [g, g], layer)
        gk.virtual_grads([h], [g], layer, [total])
        return norms * 2, total + 1

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    for batch in (4, 9, 30):
        shape = (batch, 3, 4, 4) if layer == "conv2d_relu" else (batch, 6)
        (h,), (g,) = make([shape], torch.float32)
        zeros = torch.zeros_like(gk.virtual_grads([h], [g], layer)[0])
        for actual, expected in zip(
            compiled(h, g, zeros.clone()), program(h, g, zeros.clone()), strict=True
        ):
            torch.testing.assert_close(actual, expected)


def test_compiled_gradient() -> None:
    def program(h: Tensor, g: Tensor) -> Tensor:
        return gk.virtual_grad_norms([h], [g], "residual").sum()

    torch._dynamo.reset()
    (h,), (g,) = make([(8, 5)], torch.float32)
    h.requires_grad_()
    (expected,) = torch.autograd.grad(program(h, g), h)
    (actual,) = torch.autograd.grad(torch.compile(program, fullgraph=True)(h, g), h)
    torch.testing.assert_close(actual, expected)


def test_export() -> None:
    class Merit(torch.nn.Module):
        def forward(self, h: Tensor, g: Tensor) -> Tensor:
            return gk.virtual_grad_norms([h], [g], "linear_relu")

    (h,), (g,) = make([(8, 5)], torch.float32)
    samples = torch.export.Dim("samples")
    program = torch.export.export(Merit(), (h, g), dynamic_shapes=({0: samples}, {0: samples}))
    (h,), (g,) = make([(20, 5)], torch.float32)
    torch.testing.assert_close(program.module()(h, g), Merit()(h, g))


def test_autocast_takes_what_a_product_would() -> None:
    inputs, grads = make([(64, 24), (30, 8)], torch.float32)
    lowered = [t.bfloat16() for t in inputs], [t.bfloat16() for t in grads]
    sums = [torch.zeros(24, 24), torch.zeros(8, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = gk.virtual_grad_norms(inputs, grads, "linear_relu")
        gradients = gk.virtual_grads(inputs, [g.bfloat16() for g in grads], "linear_relu")
        gk.virtual_grads(inputs, grads, "linear_relu", sums)
    assert torch.equal(norms, gk.virtual_grad_norms(*lowered, "linear_relu"))
    for ours, total, expected in zip(
        gradients, sums, gk.virtual_grads(*lowered, "linear_relu"), strict=True
    ):
        assert torch.equal(ours, expected)
        assert torch.equal(total, expected)


@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu"])
def test_vmap_over_networks(layer: str) -> None:
    networks = 3
    shapes = [(networks, *s) for s in shapes_of(layer)[:3]]
    inputs, grads = make(shapes, torch.float32)

    def norms(h: list[Tensor], g: list[Tensor]) -> Tensor:
        return gk.virtual_grad_norms(h, g, layer)

    def gradients(h: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        return gk.virtual_grads(h, g, layer)

    def accumulate(h: list[Tensor], g: list[Tensor], s: list[Tensor], m: Tensor) -> Tensor:
        return gk.virtual_grad_norms(h, g, layer, s, second_moments=m)

    all_norms = torch.func.vmap(norms)(inputs, grads)
    all_gradients = torch.func.vmap(gradients)(inputs, grads)
    sums = [torch.ones_like(G) for G in all_gradients]
    moments = torch.ones(networks, len(shapes))
    torch.func.vmap(accumulate)(inputs, grads, sums, moments)
    last = torch.func.vmap(norms, in_dims=(0, None))(inputs, [g[0] for g in grads])
    for network in range(networks):
        h, g = [x[network] for x in inputs], [x[network] for x in grads]
        torch.testing.assert_close(all_norms[network], norms(h, g))
        torch.testing.assert_close(moments[network], 1 + norms(h, g))
        torch.testing.assert_close(last[network], norms(h, [x[0] for x in grads]))
        for stacked, total, expected in zip(all_gradients, sums, gradients(h, g), strict=True):
            torch.testing.assert_close(stacked[network], expected)
            torch.testing.assert_close(total[network], 1 + expected)


def test_vmap_refuses_to_mix_sums() -> None:
    inputs, grads = make([(2, 5, 3)], torch.float32)
    shared = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="must be batched too"):
        torch.func.vmap(lambda h, g: gk.virtual_grad_norms(h, g, "residual", [shared]))(
            inputs, grads
        )


def test_flops_are_counted() -> None:
    inputs, grads = make([(10, 4), (2, 3, 5)], torch.float32)
    with FlopCounterMode(display=False) as counter:
        gk.virtual_grad_norms(inputs, grads, "linear_relu")
    assert counter.get_total_flops() == 2 * (10 * 4 * 4 + 6 * 5 * 5)
    images = torch.randn(2, 3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        gk.virtual_grads([images], [images], "conv2d_relu")
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 9 * 3 * 3


@given(
    sizes=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 50)), min_size=1, max_size=5),
    layer=st.sampled_from(["linear_relu", "residual"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shapes(
    sizes: list[tuple[int, int]], layer: str, dtype: torch.dtype, seed: int
) -> None:
    inputs, grads = make(list(sizes), dtype, seed)
    oracle = reference.virtual_grads(exact(inputs), exact(grads), layer)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    if dtype == torch.bfloat16 and layer == "residual":
        tolerance = 0.02  # tanh(h) is a bfloat16 operand
    for ours, expected in zip(gk.virtual_grads(inputs, grads, layer), oracle, strict=True):
        assert relative(ours, expected) <= tolerance


BACKEND_PROGRAM = """
import torch
import growkernels as gk
from growkernels.ops.backends import choose_backend
from growkernels.ops.virtual_grad import reference
assert choose_backend("virtual_grads", "cpu", torch.float32).backend == "portable"
generator = torch.Generator().manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float64, 1e-14)):
    for layer in ("linear_relu", "residual"):
        shapes = [(450, 5), (300, 61), (129, 401)]
        h = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        g = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        oracle = reference.virtual_grads([t.double() for t in h], [t.double() for t in g], layer)
        for ours, expected in zip(gk.virtual_grads(h, g, layer), oracle):
            assert (ours - expected).norm() <= tolerance * expected.norm(), (dtype, layer)
"""


def test_portable_backend() -> None:
    environment = {**os.environ, "GROWKERNELS_BRGEMM": "0"}
    subprocess.run([sys.executable, "-c", BACKEND_PROGRAM], env=environment, check=True)


H = torch.ones(4, 3)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "no positions": (([], [], "residual"), ValueError, "list of inputs is empty"),
    "list lengths": (([H, H], [H], "residual"), ValueError, "got 2 inputs but 1 grads"),
    "shapes": (([H], [H[:2]], "residual"), ValueError, r"shape \[4, 3\] but grads\[0\]"),
    "kind": (([H], [H], "dense"), ValueError, "unknown layer 'dense'"),
    "dimensions": (([H[0]], [H[0]], "residual"), ValueError, "at least one leading"),
    "images": (([H], [H], "conv2d_relu"), ValueError, r"needs \[N, C, H, W\]"),
    "integers": (([H.int()], [H.int()], "residual"), TypeError, "dtype Int"),
    "dtypes": (([H], [H.double()], "residual"), TypeError, "cast all positions"),
    "positions' dtypes": (([H, H.half()], [H, H.half()], "residual"), TypeError, r"inputs\[1\]"),
    "devices": (([H], [H.to("meta")], "residual"), ValueError, "grads.0. is on meta"),
    "buffers": (([H], [H], "residual", []), ValueError, "got 0 buffers"),
    "buffer shape": (([H], [H], "residual", [H]), ValueError, r"has shape \[3, 3\]"),
    "buffer dtype": (
        ([H.half()], [H.half()], "residual", [torch.zeros(3, 3).half()]),
        TypeError,
        "accumulated in Float",
    ),
    "buffer strides": (
        ([H], [H], "residual", [torch.zeros(3, 6)[:, ::2]]),
        ValueError,
        "not contiguous",
    ),
    "buffers that overlap": (
        ([H, H], [H, H], "residual", [torch.zeros(3, 3)] * 2),
        ValueError,
        "share memory",
    ),
    "buffer grad": (
        ([H], [H], "residual", [torch.zeros(3, 3, requires_grad=True)]),
        ValueError,
        "not differentiable",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_one_sentence(name: str) -> None:
    arguments, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message) as caught:
        gk.virtual_grad_norms(*arguments)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "softmax"}, "unknown activation 'softmax'"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"second_moments": torch.zeros(1)}, "without accumulate"),
        (
            {"accumulate": [torch.zeros(3, 3)], "second_moments": torch.zeros(2)},
            "one entry for each of 1 positions",
        ),
    ],
)
def test_bad_parameters(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.virtual_grad_norms([H], [H], "residual", **arguments)


def test_a_refused_call_leaves_the_buffers_alone() -> None:
    buffers = [torch.zeros(3, 3), torch.zeros(2, 2)]
    with pytest.raises(ValueError, match="buffer 1"):
        gk.virtual_grads([H, H], [H, H], "residual", buffers)
    assert not any(b.any() for b in buffers)
