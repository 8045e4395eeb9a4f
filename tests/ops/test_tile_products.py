"""Products of tiles: their code is in the library, and right for every size and stride."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import growkernels as gk
from growkernels.ops.library import library_path

LIBRARY = library_path()
SHAPES_PROGRAM = """
import torch, growkernels as gk

generator = torch.Generator().manual_seed(0)
tolerances = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}
for trial in range(240):
    dtype = list(tolerances)[trial % 3]
    rows, width, neurons, k = (
        int(torch.randint(1, most, (), generator=generator)) for most in (300, 90, 110, 4)
    )
    gap = trial % 2
    x = torch.randn(rows, width + gap, generator=generator).to(dtype)
    w = torch.randn(rows, neurons + gap, generator=generator).to(dtype)
    v = torch.randn(neurons, k, width, generator=generator).to(dtype)
    if gap:  # nothing between the rows is read
        x[:, -1] = w[:, -1] = float("nan")
    x, w = x[:, :width], w[:, :neurons]
    products = torch.einsum("md,nkd->mnk", x.double(), v.double())
    expected = torch.einsum("mn,mnk,md->nkd", w.double(), products, x.double())
    error = (gk.splitting_hvp(x, w, v) - expected).norm() / expected.norm()
    assert error <= tolerances[dtype], (dtype, rows, width, neurons, k, float(error))

    grads = torch.randn(rows, width, generator=generator).to(dtype)
    (gradient,) = gk.virtual_grads([x], [grads], "linear_relu")
    expected = (grads.double() * (x > 0)).t() @ x.double()
    error = (gradient - expected).norm() / (expected.norm() + 1e-30)
    assert error <= tolerances[dtype] / 4, (dtype, rows, width, float(error))
"""


def test_nothing_is_generated_for_the_sizes_of_a_call() -> None:
    """What oneDNN generates is kept for ever, and a network that grows has new sizes every time."""
    assert b"brgemm" not in LIBRARY.read_bytes()


@pytest.mark.parametrize("tiles", ["amx", "avx512", "none"])
def test_random_sizes_and_strides(tiles: str) -> None:
    environment = {**os.environ, "GROWKERNELS_BFLOAT16_TILES": tiles}
    subprocess.run([sys.executable, "-c", SHAPES_PROGRAM], env=environment, check=True)


def test_unknown_tiles_in_the_environment() -> None:
    program = "import torch, growkernels; torch.ops.growkernels.bfloat16_tiles()"
    environment = {**os.environ, "GROWKERNELS_BFLOAT16_TILES": "fast"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    message = "GROWKERNELS_BFLOAT16_TILES is 'fast'; use 'amx', 'avx512' or 'none'"
    assert message in finished.stderr


def test_tiles_after_those_of_torch() -> None:
    """torch's own tiles may have left the registers in another shape."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 64, generator=generator).bfloat16()
    before = gk.splitting_hvp(x, x, x)
    query = torch.randn(1, 2, 64, 64, generator=generator).bfloat16()
    attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch.equal(gk.splitting_hvp(x, x, x), before)
    again = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch.equal(again, attended)
