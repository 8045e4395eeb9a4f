"""basis_conv2d in bfloat16 by packed tiles: every way in which images are laid side by side."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from op_samples import OPS
from op_samples.basis_conv import Shape
from op_samples.numbers import LAYOUTS, doubled, largest
from torch import Tensor

import growkernels as gk
from growkernels.ops.basis_conv.plan import plan_basis_conv2d

OP = OPS["basis_conv2d"]
TILES = torch.ops.growkernels.bfloat16_tiles()
needs_tiles = pytest.mark.skipif(TILES == "none", reason="no tiles of bfloat16 here")
CHANNELS_LAST = LAYOUTS["channels_last"]
# A rounding of the maps, one of the results, and one where a bias was added between.
TOLERANCE = 3 * torch.finfo(torch.bfloat16).eps

SHAPES = [
    Shape((1, 33, 7, 7), 20, 17),  # rows of one image as one long row
    Shape((1, 5, 3, 33), 33, 3, (3, 5), padding=(2, 4)),
    Shape((2, 16, 16, 32), 8, 8),  # a block is a row
    Shape((5, 3, 4, 4), 17, 40),  # five images side by side
    Shape((33, 40, 4, 5), 33, 31),  # pixels of 32 images, and one image more
    Shape((32, 70, 2, 2), 40, 33),  # taps outside of the image are left out
    Shape((33, 5, 1, 7), 3, 4, (5, 1), (3, 1), (4, 4), (1, 3)),  # rows and columns without inputs
    Shape((3, 18, 9, 7), 16, 16, stride=(2, 3)),
    Shape((34, 18, 9, 7), 16, 16, (3, 2), (2, 3), (2, 1), (1, 2)),
    Shape((2, 6, 5, 1), 1, 1, (1, 1), (2, 2), (0, 0)),
    Shape((2, 64, 40, 40), 32, 32, padding=(0, 2)),  # several bands of rows
    Shape((1, 1, 1, 1), 1, 0, (1, 1), padding=(0, 0)),
    Shape((4, 2, 12, 12), 30, 40, (5, 5), padding=(2, 2)),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("include_basis", [True, False], ids=["with basis", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients(shape: Shape, include_basis: bool, bias: bool) -> None:
    sample = shape.sample(include_basis, bias, unit=True)
    for arrange in (CHANNELS_LAST, Tensor.contiguous):
        tensors = [arrange(t) for t in sample.tensors(torch.bfloat16)]
        expected = OP.with_gradients(OP.oracle, doubled(tensors), sample)
        actual = OP.with_gradients(OP.function, tensors, sample, arrange)
        for index, (mine, exact) in enumerate(zip(actual, expected, strict=True)):
            if exact.numel() < 10:  # one value may be a small difference
                continue
            assert largest(mine, exact) <= TOLERANCE, index


def in_a_process(program: list[str], **switches: str) -> str:
    """Output of Python with these settings, which are read once."""
    finished = subprocess.run(
        [sys.executable, *program],
        env={**os.environ, **switches},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.skipif(TILES != "amx", reason="no second kind of tiles here")
def test_avx512_gives_the_same() -> None:
    suite = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    in_a_process([*suite, "-k", "test_results and mixed-bias"], GROWKERNELS_BFLOAT16_TILES="avx512")


def test_without_tiles_images_are_widened() -> None:
    program = (
        "import torch, growkernels; shapes = ((4, 16, 12, 12), (8, 16, 3, 3), (8, 8));"
        "tensors = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes];"
        "one = [1, 1]; algorithm = torch.ops.growkernels.basis_conv2d_algorithm;"
        "print(algorithm(*tensors, one, one, one, True))"
    )
    printed = in_a_process(["-c", program], GROWKERNELS_BFLOAT16_TILES="none")
    assert printed.strip() == "winograd"


def test_torch_kept_from_avx512_keeps_us_from_tiles() -> None:
    program = "import torch, growkernels; print(torch.ops.growkernels.bfloat16_tiles())"
    assert in_a_process(["-c", program], ATEN_CPU_CAPABILITY="avx2").strip() == "none"


@needs_tiles
def test_bfloat16_alone_has_tiles() -> None:
    shapes = ((4, 16, 12, 12), (8, 16, 3, 3), (8, 8))
    chosen = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = [torch.ones(shape, dtype=dtype) for shape in shapes]
        chosen[dtype] = plan_basis_conv2d(*tensors, [2, 2], [1, 1], [1, 1], True)
    assert chosen[torch.bfloat16].backend == "tiles"
    assert ("tiles", "they are for bfloat16") in chosen[torch.float16].refused
    assert "tiles" not in {plan.backend for plan in list(chosen.values())[1:]}


@needs_tiles
def test_winograd_stands_against_amx_alone() -> None:
    shapes = ((4, 16, 12, 12), (8, 16, 3, 3), (8, 8))
    tensors = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
    plan = plan_basis_conv2d(*tensors, [1, 1], [1, 1], [1, 1], True)
    assert plan.backend == ("tiles" if TILES == "amx" else "winograd")


def test_a_nan_stays_within_its_reach() -> None:
    """Neither padded channels nor pixels beyond a row's end carry it further."""
    sample = Shape((3, 5, 6, 7), 3, 4).sample(bias=False)
    for value in (torch.nan, torch.inf):
        tensors = [CHANNELS_LAST(t) for t in sample.tensors(torch.bfloat16)]
        tensors[0][1, 2, 0, 0] = value
        plain = OP.results(OP.oracle, doubled(tensors), sample)[0]
        (y,) = OP.results(OP.function, tensors, sample)
        assert torch.equal(y.isfinite(), plain.isfinite())
        x, basis, coeff = (t.detach().requires_grad_() for t in tensors)
        z = gk.basis_conv2d(x, basis, coeff, padding=1)
        z.backward(torch.ones_like(z))
        assert basis.grad is not None
        # The corner pixel meets the four taps that have outputs there.
        finite = torch.ones(3, 3, dtype=torch.bool)
        finite[:2, :2] = False
        assert torch.equal(basis.grad[0, 2].isfinite(), finite)
        assert basis.grad[:, [0, 1, 3, 4]].isfinite().all()


def test_maps_that_were_overwritten_are_computed_again() -> None:
    """A vendor's 16-bit convolution of so narrow an image is wrong."""
    shape = Shape((32, 16, 7, 1), 16, 16, (5, 3), (1, 3), (4, 1))
    sample = shape.sample(bias=False, unit=True)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [t.requires_grad_() for t in sample.tensors(dtype)]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        options = {"stride": (1, 3), "padding": (4, 1)}
        y = gk.basis_conv2d(*tensors, **options).relu_()  # type: ignore[arg-type]
        z = OP.oracle(*exact, **options, dilation=1, include_basis=True)
        torch.where(y.detach() > 0, z, 0).sum().backward()
        y.sum().backward()
        for mine, right in zip(tensors, exact, strict=True):
            assert mine.grad is not None
            assert right.grad is not None
            assert largest(mine.grad, right.grad) <= 0.02
