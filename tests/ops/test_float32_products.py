"""float32 products by bfloat16 tiles: where torch's setting allows it, as exact as it says.

Virtual gradients and products with splitting matrices follow the setting, and nothing else does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import growkernels as gk
from growkernels.ops.backends import choose_backend
from growkernels.ops.splitting import plan as splitting
from growkernels.ops.splitting import reference
from growkernels.ops.virtual_grad import plan as virtual_grad

ops = torch.ops.growkernels
HAS_AMX = ops.bfloat16_tiles() == "amx"
# Of |g|^T |h|, beside the rounding of sums: bfloat16 has 8 bits, to which both factors are rounded.
LEFT_OUT = {"none": 0.0, "ieee": 0.0, "tf32": 0.0, "bf16": 2 * 2.0**-8 + 2.0**-16}
LAYERS = ("linear", "linear_relu", "residual")
BACKENDS: Any = torch.backends  # torch's stubs do not know the setting
matmul = BACKENDS.mkldnn.matmul


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    before = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = before


def position(samples: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    return (
        torch.randn(samples, width, generator=generator),
        torch.randn(samples, height, generator=generator),
    )


def factors(h: Tensor, g: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """What the layer multiplies, in float64."""
    g = g.double() * (h > 0) if layer == "linear_relu" else g.double()
    return g, h.double().tanh() if layer == "residual" else h.double()


@pytest.mark.parametrize("setting", LEFT_OUT, indirect=True)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("samples", [1, 33, 700])
def test_errors_are_those_of_the_setting(samples: int, layer: str, setting: str) -> None:
    widths = [(40, 40), (3, 3), (33, 33), (400, 400)]
    if layer == "linear":
        widths += [(70, 20), (2, 90), (90, 2)]
    inputs, grads = map(list, zip(*(position(samples, *pair) for pair in widths), strict=True))
    gradients = gk.virtual_grads(inputs, grads, layer)
    norms = gk.virtual_grad_norms(inputs, grads, layer)
    rounding = (samples + 4) * 2.0**-24
    for i, gradient in enumerate(gradients):
        left, right = factors(inputs[i], grads[i], layer)
        exact = left.t() @ right
        bound = (LEFT_OUT[setting] + rounding) * (left.abs().t() @ right.abs())
        if layer == "residual":  # tanh's own rounding
            bound += 2.0**-22 * (left.abs().t() @ torch.ones_like(right))
        assert ((gradient - exact).abs() <= bound).all()
        assert (
            abs(norms[i] - exact.square().sum())
            <= (2 * exact.abs() * bound + bound**2).sum() * 1.01
        )


@pytest.mark.parametrize("setting", LEFT_OUT, indirect=True)
def test_what_ran_is_what_the_plan_says(setting: str) -> None:
    tiles = HAS_AMX and setting == "bf16"
    for width in (1, 32, 33, 64):
        h, g = position(50, width, width)
        chosen = virtual_grad.plan_position(h, "linear_relu")
        assert chosen.backend == ("bfloat16 tiles" if tiles and width > 32 else "portable")
        ops.kernels_ran()
        gk.virtual_grads([h], [g], "linear_relu")
        assert ops.kernels_ran() == [chosen.backend]
    printed = choose_backend("virtual_grads", "cpu", torch.float32)
    assert (printed.backend == "bfloat16 tiles") == tiles
    if setting != "bf16":
        reason = "torch is not set to round float32 to bfloat16"
        assert ("bfloat16 tiles", reason) in printed.refused


@pytest.mark.parametrize("setting", ["bf16"], indirect=True)
def test_nothing_else_follows_the_setting(setting: str) -> None:
    h, g = position(200, 48, 48)
    calls = [
        lambda: gk.virtual_grads([h.double()], [g.double()], "linear")[0],
        lambda: gk.virtual_grads([h.bfloat16()], [g.bfloat16()], "linear")[0],
        lambda: gk.virtual_grads([h.view(2, 48, 10, 10)], [g.view(2, 48, 10, 10)], "conv2d_relu")[
            0
        ],
        lambda: gk.splitting_hvp(h, g, h[:48], full_precision=True),
        lambda: gk.splitting_hvp(h.double(), g.double(), h[:48].double()),
        lambda: gk.splitting_hvp(h.bfloat16(), g.bfloat16(), h[:48].bfloat16()),
        lambda: gk.splitting_hvp_conv2d(
            h.view(2, 48, 10, 10), g.view(2, 48, 10, 10), h[:48, :, None, None]
        ),
    ]
    allowed = [call() for call in calls]
    matmul.fp32_precision = "ieee"
    for before, call in zip(allowed, calls, strict=True):
        assert torch.equal(before, call())


@pytest.mark.parametrize("setting", ["bf16"], indirect=True)
def test_values_that_are_not_finite_stay_so(setting: str) -> None:
    h, g = position(64, 40, 40)
    h[3, 5], g[9, 7], g[60, 8] = torch.inf, torch.nan, 3.4e38
    (gradient,) = gk.virtual_grads([h], [g], "linear")
    finite = gradient.isfinite()
    assert not finite[:, 5].any()
    assert not finite[7].any()
    others = torch.ones(40, 40, dtype=torch.bool)
    others[:, 5] = others[7] = others[8] = False
    assert finite[others].all()


PRODUCTS = [(1, 1, 1, 1), (40, 7, 1, 33), (300, 70, 1, 100), (700, 50, 3, 64), (500, 200, 1, 600)]


@pytest.mark.parametrize("setting", LEFT_OUT, indirect=True)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("rows", "neurons", "k", "width"), PRODUCTS)
def test_products_with_splitting_matrices_round_as_the_setting_says(
    rows: int, neurons: int, k: int, width: int, strided: bool, setting: str
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator)
    w = torch.randn(rows, neurons, generator=generator)
    v = torch.randn(neurons, k, width, generator=generator)
    if strided:
        x, w, v = (part.movedim(-1, 0).contiguous().movedim(0, -1) for part in (x, w, v))
    ops.kernels_ran()
    y = gk.splitting_hvp(x, w, v)
    chosen = splitting.plan_hvp(x, w, v).backend
    assert ops.kernels_ran() == [chosen]
    assert (chosen == "bfloat16 tiles") == (HAS_AMX and setting == "bf16")
    exact = reference.splitting_hvp(x.double(), w.double(), v.double())
    # x is rounded for either product, v, and the product of rows and vectors by the weights.
    left_out = 2 * LEFT_OUT[setting] + LEFT_OUT[setting] ** 2
    bound = reference.splitting_hvp(*(part.double().abs() for part in (x, w, v)))
    assert ((y - exact).abs() <= (left_out + (rows + width + 8) * 2.0**-24) * bound).all()


@pytest.mark.parametrize("setting", ["bf16"], indirect=True)
def test_the_gradient_of_a_product_in_full_precision_is_so_too(setting: str) -> None:
    h, g = position(200, 48, 48)
    v = h[:48].clone().requires_grad_()

    def gradient() -> Tensor:
        gk.splitting_hvp(h, g, v, full_precision=True).backward(h[48:96])
        assert v.grad is not None
        found, v.grad = v.grad, None
        return found

    rounded = gradient()
    matmul.fp32_precision = "ieee"
    assert torch.equal(rounded, gradient())


def test_full_precision_is_kept_under_vmap_and_compile() -> None:
    h, g = position(200, 48, 48)

    def product(v: Tensor) -> Tensor:
        return gk.splitting_hvp(h, g, v, full_precision=True)

    vectors = torch.stack((h[:48], h[48:96]))
    before = matmul.fp32_precision
    expected = torch.vmap(product)(vectors)
    matmul.fp32_precision = "bf16"
    try:
        assert torch.equal(torch.vmap(product)(vectors), expected)
        compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(vectors[0]), product(vectors[0]))
    finally:
        matmul.fp32_precision = before


SETTINGS_PROGRAM = """
import json, torch, growkernels as gk
generator = torch.Generator().manual_seed(0)
h, g = torch.randn(300, 70, generator=generator), torch.randn(300, 50, generator=generator)
found = {}
for precision in ("unset", "high", "medium"):
    if precision != "unset":
        torch.set_float32_matmul_precision(precision)
    (gradient,) = gk.virtual_grads([h], [g], "linear")
    found[precision] = gradient.numpy().tobytes().hex()
print(json.dumps(found))
"""


def bits(tiles: str) -> dict[str, str]:
    """By what torch is set to, and before anything is."""
    finished = subprocess.run(
        [sys.executable, "-c", SETTINGS_PROGRAM],
        env={**os.environ, "GROWKERNELS_BFLOAT16_TILES": tiles},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(finished.stdout)  # type: ignore[no-any-return]


def test_the_default_is_the_same_with_and_without_tiles() -> None:
    with_tiles, without = bits("amx"), bits("none")
    default = with_tiles["unset"]
    assert without["unset"] == with_tiles["high"] == without["medium"] == default
    assert (with_tiles["medium"] != default) == HAS_AMX
