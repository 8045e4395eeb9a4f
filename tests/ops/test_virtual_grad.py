"""What is special about virtual gradients; the rest is in test_contract_*.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_samples.virtual_grad import IMAGES, KINDS, LINEAR, H, positions
from torch import Tensor

import growkernels as gk

EVERY_LAYER = pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu", "linear"])


def draw(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int = 0, layer: str = "residual"
) -> tuple[list[Tensor], list[Tensor]]:
    tensors = positions(shapes, layer).tensors(dtype, seed=seed)
    return tensors[: len(shapes)], tensors[len(shapes) :]


@pytest.mark.parametrize(("layer", "activation", "scale"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_over_batches(
    layer: str, activation: str, scale: float, dtype: torch.dtype
) -> None:
    params: dict[str, Any] = {"activation": activation, "scale": scale}
    shapes = IMAGES if layer == "conv2d_relu" else LINEAR
    batches = [draw(shapes, dtype, seed, layer) for seed in range(3)]
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
    inputs, grads = draw([(6, 4)], torch.float32)
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


def test_linear_is_the_gradient_of_a_zero_layer_behind_any_features() -> None:
    """y + W phi, W = 0, with as many rows as y has features and columns as phi has."""
    generator = torch.Generator().manual_seed(2)
    y, features, head = (
        torch.randn(3, 4, size, generator=generator, dtype=torch.float64) for size in (5, 7, 5)
    )
    weight = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    ((y + features @ weight.T).sin() * head).sum().backward()
    (actual,) = gk.virtual_grads([features], [head * y.cos()], "linear")
    torch.testing.assert_close(actual, weight.grad, rtol=1e-12, atol=1e-12)


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


@EVERY_LAYER
def test_sums_are_compiled_without_breaks(layer: str) -> None:
    def program(h: Tensor, g: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        norms = gk.virtual_grad_norms([h, h + 1], [g, g], layer)
        gk.virtual_grads([h], [g], layer, [total])
        return norms * 2, total + 1

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    for batch in (4, 9):
        shape = (batch, 3, 4, 4) if layer == "conv2d_relu" else (batch, 6)
        (h,), (g,) = draw([shape], torch.float32, layer=layer)
        zeros = torch.zeros_like(gk.virtual_grads([h], [g], layer)[0])
        for actual, expected in zip(
            compiled(h, g, zeros.clone()), program(h, g, zeros.clone()), strict=True
        ):
            torch.testing.assert_close(actual, expected)


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_sums(layer: str, dtype: torch.dtype) -> None:
    shapes = [(2, 3, 5, 5)] if layer == "conv2d_relu" else [(45, 5), (7, 16)]
    inputs, grads = draw(shapes, dtype, layer=layer)
    sums = [torch.zeros_like(G) for G in gk.virtual_grads(inputs, grads, layer)]
    moments = torch.zeros(len(sums), dtype=sums[0].dtype)
    tolerances = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(
        torch.ops.growkernels.accumulate_virtual_grads.default,
        (inputs, grads, layer, "tanh", 0.8, sums, moments),
        **tolerances,
    )


def test_sums_under_autocast() -> None:
    inputs, grads = draw([(64, 24), (30, 8)], torch.float32)
    sums = [torch.zeros(24, 24), torch.zeros(8, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gk.virtual_grads(inputs, grads, "linear_relu", sums)
    lowered = [t.bfloat16() for t in inputs], [t.bfloat16() for t in grads]
    for total, expected in zip(sums, gk.virtual_grads(*lowered, "linear_relu"), strict=True):
        assert torch.equal(total, expected)


@EVERY_LAYER
def test_sums_of_several_networks_by_vmap(layer: str) -> None:
    networks = 3
    shapes = IMAGES if layer == "conv2d_relu" else LINEAR[:3]
    inputs, grads = draw([(networks, *shape) for shape in shapes], torch.float32, layer=layer)
    sums = [torch.ones(networks, *G.shape) for G in gk.virtual_grads(
        [h[0] for h in inputs], [g[0] for g in grads], layer)]  # fmt: skip
    moments = torch.ones(networks, len(shapes))

    def accumulate(h: list[Tensor], g: list[Tensor], s: list[Tensor], m: Tensor) -> Tensor:
        return gk.virtual_grad_norms(h, g, layer, s, second_moments=m)

    norms = torch.func.vmap(accumulate)(inputs, grads, sums, moments)
    for network in range(networks):
        h, g = [x[network] for x in inputs], [x[network] for x in grads]
        expected = [1 + gradient for gradient in gk.virtual_grads(h, g, layer)]
        torch.testing.assert_close([total[network] for total in sums], expected)
        torch.testing.assert_close(
            norms[network], torch.stack([total.square().sum() for total in expected])
        )
        torch.testing.assert_close(moments[network], 1 + gk.virtual_grad_norms(h, g, layer))


def test_vmap_refuses_to_mix_sums() -> None:
    inputs, grads = draw([(2, 5, 3)], torch.float32)
    shared = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="must be batched too"):
        torch.func.vmap(lambda h, g: gk.virtual_grad_norms(h, g, "residual", [shared]))(
            inputs, grads
        )


BACKEND_PROGRAM = """
import torch
import growkernels as gk
from growkernels.ops.backends import choose_backend
from growkernels.ops.virtual_grad import reference
backend = choose_backend("virtual_grads", "cpu", torch.float32).backend
assert backend in ("portable", "vendor's product")
generator = torch.Generator().manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float64, 1e-14)):
    for layer in ("linear_relu", "residual", "linear"):
        shapes = [(450, 5), (300, 61), (129, 401)]
        h = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        more = 7 if layer == "linear" else 0
        g = [torch.randn(m, d + more, generator=generator).to(dtype) for m, d in shapes]
        oracle = reference.virtual_grads([t.double() for t in h], [t.double() for t in g], layer)
        for ours, expected in zip(gk.virtual_grads(h, g, layer), oracle):
            assert (ours - expected).norm() <= tolerance * expected.norm(), (dtype, layer)
"""


@pytest.mark.parametrize("tiles", ["none", "avx512"])
def test_lesser_tiles(tiles: str) -> None:
    environment = {**os.environ, "GROWKERNELS_BFLOAT16_TILES": tiles}
    subprocess.run([sys.executable, "-c", BACKEND_PROGRAM], env=environment, check=True)


def test_a_refused_call_leaves_the_buffers_alone() -> None:
    buffers = [torch.zeros(3, 3), torch.zeros(2, 2)]
    with pytest.raises(ValueError, match="buffer 1"):
        gk.virtual_grads([H, H], [H, H], "residual", buffers)
    assert not any(b.any() for b in buffers)
