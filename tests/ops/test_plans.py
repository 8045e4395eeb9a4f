"""What runs is what the plans say, for every op, device, dtype and a grid of shapes.

On the CPU the kernels themselves tell that they ran. CUDA tensors are stood in for by the CPU's, on
which the functions registered for them start Triton's kernels, whose launches are counted here, or
the composed ops, which tell that they ran. What other devices have is the composed ops.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import growkernels as gk
from growkernels.ops.backends import DTYPES, EXAMPLES, choose_backend
from growkernels.ops.basis_conv import gpu as basis_conv_gpu
from growkernels.ops.basis_conv import plan as basis_conv
from growkernels.ops.eigen import plan as eigen
from growkernels.ops.gpu_support import Gpu
from growkernels.ops.plan import Plan
from growkernels.ops.splitting import gpu as splitting_gpu
from growkernels.ops.splitting import plan as splitting
from growkernels.ops.virtual_grad import plan as virtual_grad

ops = torch.ops.growkernels
XPU = torch.device("xpu")
CARDS = {
    "H100": Gpu((9, 0), 132, 227 * 1024, True),
    "RTX 4090": Gpu((8, 9), 128, 99 * 1024, True),
    "old": Gpu((7, 5), 46, 64 * 1024, True),
    "without Triton": Gpu((9, 0), 132, 227 * 1024, False),
}


def ran(op: Callable[..., object], *arguments: object) -> set[str]:
    """Names of the kernels that a call has run: of products of tiles only where they are all."""
    ops.kernels_ran()
    op(*arguments)
    names = set(ops.kernels_ran())
    return names - {"bfloat16 tiles", "portable"} or names


def backends(chosen: Plan) -> set[str]:
    assert chosen.backend is not None
    return set(chosen.backend.split(" and "))


# The setting concerns float32 alone.
ALGORITHMS = [(dtype, "auto") for dtype in DTYPES] + [
    (torch.float32, "direct"),
    (torch.float32, "winograd"),
]


@pytest.fixture
def algorithm(request: pytest.FixtureRequest) -> Iterator[str]:
    before = gk.conv_algorithm()
    gk.set_conv_algorithm(request.param)
    yield request.param
    gk.set_conv_algorithm(before)


# --- virtual_grad

# Widths with tiles of 16 columns and more, of fewer, and both at once.
ROWS = [(450, 5), (3, 16), (40, 15), (7, 2, 33), (9, 390), (1, 1), (0, 4)]
IMAGES = [(2, 16, 33, 17), (8, 24, 8, 8), (1, 3, 5, 7), (2, 16, 4, 4), (0, 4, 6, 6)]


def virtual_grad_calls(h: Tensor, layer: str) -> list[Callable[[], object]]:
    call = ([h], [torch.ones_like(h)], layer, "tanh", 1.0)
    sums = ops.virtual_grads(*call)
    return [
        partial(ops.virtual_grad_norms, *call),
        partial(ops.virtual_grads, *call),
        partial(ops.accumulate_virtual_grads, *call, sums, None),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ["linear_relu", "residual", "linear"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_linear_positions(shape: tuple[int, ...], layer: str, dtype: torch.dtype) -> None:
    h = torch.ones(shape, dtype=dtype)
    chosen = backends(virtual_grad.plan_position(h, layer))
    for call in virtual_grad_calls(h, layer):
        assert ran(call) == (chosen if h.numel() else set())


@pytest.mark.parametrize(("dtype", "algorithm"), ALGORITHMS, ids=str, indirect=["algorithm"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_convolution_positions(shape: tuple[int, ...], dtype: torch.dtype, algorithm: str) -> None:
    h = torch.ones(shape, dtype=dtype)
    chosen = virtual_grad.plan_position(h, "conv2d_relu")
    for call in virtual_grad_calls(h, "conv2d_relu"):
        assert ran(call) == backends(chosen)
    assert (chosen.backend == "winograd") == ("winograd" not in dict(chosen.refused))


# --- splitting


def products(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, neurons, vectors, width = shape
    x, w = torch.ones(rows, width, dtype=dtype), torch.ones(rows, neurons, dtype=dtype)
    return x, w, torch.ones(neurons, vectors, width, dtype=dtype)


PRODUCTS = [(40, 7, 1, 5), (3, 2, 2, 130), (9, 3, 1, 390), (0, 3, 1, 4), (20, 256, 1, 260)]
# Images, filters [n, k, kh, kw], stride, padding, dilation.
Sliding = tuple[tuple[int, ...], tuple[int, ...], int, int, int]
CONVOLUTIONS: list[Sliding] = [
    ((2, 16, 33, 17), (8, 1, 3, 3), 1, 1, 1),
    ((8, 16, 8, 8), (4, 2, 3, 3), 1, 0, 1),
    ((1, 16, 8, 8), (8, 1, 3, 3), 1, 1, 1),
    ((2, 16, 17, 17), (8, 1, 3, 3), 2, 1, 1),
    ((2, 16, 17, 17), (8, 1, 3, 3), 1, 2, 2),
    ((2, 5, 9, 9), (3, 1, 1, 1), 1, 0, 1),
    ((2, 70, 9, 9), (3, 1, 3, 2), 1, 0, 1),
    ((0, 5, 9, 9), (3, 1, 3, 3), 1, 0, 1),
]


def convolution(case: Sliding, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, (n, k, height, width), *numbers = case
    sliding = [[number, number] for number in numbers]
    x, v = torch.ones(shape, dtype=dtype), torch.ones(n, k, shape[1], height, width, dtype=dtype)
    like = torch.nn.functional.conv2d(x[:, :1], v[:, 0, :1], None, *sliding)
    return x, torch.ones_like(like), v, *sliding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splitting_weights(dtype: torch.dtype) -> None:
    z = torch.ones(5, 3, dtype=dtype)
    assert ran(ops.splitting_weight, z, z, "gelu", None) == backends(splitting.plan_weight(z))
    assert ran(ops.splitting_weight_composed, z, z, "gelu", None) == backends(
        splitting.plan_weight(z, XPU)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_splitting_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call = products(shape, dtype)
    chosen = backends(splitting.plan_hvp(*call)) if shape[0] else set()
    assert ran(ops.splitting_hvp, *call) == chosen
    elsewhere = backends(splitting.plan_hvp(*call, XPU))
    assert ran(ops.splitting_hvp_composed, *call) == elsewhere


@pytest.mark.parametrize(("dtype", "algorithm"), ALGORITHMS, ids=str, indirect=["algorithm"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_splitting_convolutions(case: Sliding, dtype: torch.dtype, algorithm: str) -> None:
    call = convolution(case, dtype)
    chosen = backends(splitting.plan_hvp_conv2d(*call)) if case[0][0] else set()
    assert ran(ops.splitting_hvp_conv2d, *call) == chosen
    elsewhere = backends(splitting.plan_hvp_conv2d(*call, XPU))
    assert ran(ops.splitting_hvp_conv2d_composed, *call) == elsewhere


# --- eigen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 1, 1), (2, 40, 40), (0, 3, 3)], ids=str)
def test_small_matrices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = torch.ones(shape, dtype=dtype)
    chosen = backends(eigen.plan_symmetric_eigs(a)) if a.numel() else set()
    assert ran(ops.symmetric_eigs, a) == chosen
    assert eigen.plan_symmetric_eigs(a, XPU).backend == "aten"


# --- basis_conv

# Images, filters, combinations, kernel, stride, padding.
BasisCase = tuple[tuple[int, ...], int, int, int, int, int]
BASIS: list[BasisCase] = [
    ((2, 16, 33, 17), 8, 8, 3, 1, 1),
    ((2, 3, 9, 9), 4, 5, 3, 1, 1),
    ((2, 16, 17, 17), 8, 8, 3, 2, 1),
    ((2, 16, 9, 9), 8, 8, 1, 1, 0),
    ((2, 16, 9, 9), 8, 8, 1, 2, 0),
    ((2, 16, 12, 12), 8, 0, 3, 1, 1),
    ((2, 2, 12, 12), 30, 40, 5, 1, 2),
    ((0, 4, 6, 6), 3, 3, 3, 1, 1),
]
# Of so many positions as fill a GPU.
MANY: BasisCase = ((32, 4, 16, 16), 16, 24, 3, 1, 1)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def basis_calls(
    case: BasisCase, dtype: torch.dtype, layout: str, include_basis: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of the forward pass, without a bias, and of the backward pass."""
    shape, filters, mixed, kernel, stride, padding = case
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    basis = torch.zeros(filters, shape[1], kernel, kernel, dtype=dtype)
    coeff = torch.zeros(mixed, filters, dtype=dtype)
    form = ([stride] * 2, [padding] * 2, [1, 1], include_basis)
    z = torch.nn.functional.conv2d(x, basis, None, stride, padding)
    y = x.new_zeros(len(x), mixed + include_basis * filters, *z.shape[2:])
    return (x, basis, coeff, *form), (y, x, basis, coeff, z, None, *form, [True] * 4)


@pytest.mark.parametrize(("dtype", "algorithm"), ALGORITHMS, ids=str, indirect=["algorithm"])
@pytest.mark.parametrize(
    ("case", "include_basis"), [(c, b) for c in BASIS for b in (True, False) if b or c[2]], ids=str
)
def test_basis_convolutions(
    case: BasisCase, include_basis: bool, dtype: torch.dtype, algorithm: str
) -> None:
    for layout in LAYOUTS:
        call, backward = basis_calls(case, dtype, layout, include_basis)
        with_bias = (*call[:3], None, *call[3:])
        chosen = basis_conv.plan_basis_conv2d(*call)
        assert ran(ops.basis_conv2d, *with_bias) == backends(chosen)
        assert ran(ops.basis_conv2d_backward, *backward) == backends(chosen)
        assert ops.basis_conv2d_algorithm(*call) == chosen.backend
        if not include_basis:
            with_maps = backends(chosen) - {"reconstruct"} or {"two convolutions"}
            assert ran(ops.basis_conv2d_with_maps, *with_bias) == with_maps
        elsewhere = backends(basis_conv.plan_basis_conv2d(*call, XPU))
        assert ran(ops.basis_conv2d_composed, *with_bias) == elsewhere
        assert ran(ops.basis_conv2d_backward_composed, *backward) == elsewhere


# --- CUDA


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Backends of ours whose Triton kernels were launched; nothing is computed."""
    pytest.importorskip("triton")
    from growkernels.ops.basis_conv import triton_launch as basis_launch
    from growkernels.ops.splitting import triton_launch as splitting_launch

    names: set[str] = set()

    def stand_in(module: object, function: str, backend: str) -> None:
        monkeypatch.setattr(module, function, lambda *_: names.add(backend))

    stand_in(splitting_launch, "splitting_weight", "triton")
    stand_in(splitting_launch, "fused", "fused")
    stand_in(splitting_launch, "projected", "projected")
    stand_in(basis_launch, "convolve", "triton")
    stand_in(basis_launch, "mix", "direct")
    stand_in(basis_launch, "coefficient_backward", "backward")
    return names


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("card", CARDS)
def test_splitting_on_a_gpu(
    card: str,
    tf32: bool,
    launched: set[str],
    pass_for_gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pass_for_gpu(splitting_gpu, splitting, CARDS[card])
    monkeypatch.setattr(splitting, "tf32_is_allowed", lambda: tf32)
    cuda = torch.device("cuda")
    seen = set()

    def check(chosen: Plan, op: Callable[..., object], *arguments: object) -> None:
        launched.clear()
        composed = ran(op, *arguments)
        assert launched | composed == backends(chosen)
        assert chosen.backend not in dict(chosen.refused)
        seen.add(chosen.backend)

    for dtype in DTYPES:
        z = torch.ones(5, 3, dtype=dtype)
        check(splitting.plan_weight(z, cuda), splitting_gpu.splitting_weight, z, z, "gelu", None)
        for shape in PRODUCTS:
            call = products(shape, dtype)
            if shape[0]:
                check(splitting.plan_hvp(*call, cuda), splitting_gpu.splitting_hvp, *call)
                exact = splitting.plan_hvp(*call, cuda, full_precision=True)
                product = partial(splitting_gpu.splitting_hvp, full_precision=True)
                check(exact, product, *call)
                assert not isinstance(exact.parameters, splitting.Fused) or (
                    exact.parameters.precision == "ieee"
                )
        for case in CONVOLUTIONS:
            if case[0][0]:
                images = convolution(case, dtype)
                check(
                    splitting.plan_hvp_conv2d(*images, cuda),
                    splitting_gpu.splitting_hvp_conv2d,
                    *images,
                )
    ours = card not in ("old", "without Triton")
    assert seen == ({"triton", "fused", "projected", "aten"} if ours else {"aten"})


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("card", CARDS)
def test_basis_convolutions_on_a_gpu(
    card: str,
    tf32: bool,
    launched: set[str],
    pass_for_gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pass_for_gpu(basis_conv_gpu, basis_conv, CARDS[card])
    monkeypatch.setattr(basis_conv, "_tf32", lambda: tf32)
    cuda = torch.device("cuda")
    ours = card not in ("old", "without Triton")
    seen = set()
    cases = [*BASIS, MANY] if ours else BASIS[5:]
    for case, dtype, include_basis in itertools.product(cases, DTYPES, (True, False)):
        if not include_basis and not case[2]:
            continue
        call, backward = basis_calls(case, dtype, "channels_last", include_basis)
        chosen = basis_conv.plan_basis_conv2d(*call, cuda)
        launched.clear()
        composed = ran(basis_conv_gpu.basis_conv2d, *call[:3], None, *call[3:])
        assert launched | composed == backends(chosen)
        assert basis_conv_gpu.basis_conv2d_algorithm(*call) == chosen.backend
        composed = ran(basis_conv_gpu.basis_conv2d_backward, *backward)
        assert composed == (set() if chosen.parameters else backends(chosen))
        seen.add(chosen.backend)
    composed_alone = {"two convolutions", "reconstruct"}
    assert seen == (composed_alone | {"triton", "direct"} if ours else composed_alone)


# --- what is printed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", EXAMPLES)
def test_info_prints_the_plan(op: str, dtype: torch.dtype) -> None:
    for device in (torch.device("cpu"), XPU):
        printed, chosen = choose_backend(op, device, dtype), EXAMPLES[op].plan(device, dtype)
        assert printed.backend == chosen.backend
        assert printed.backend is None or printed.backend in EXAMPLES[op].backends
        assert dict(printed.refused).items() >= dict(chosen.refused).items()


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the plans see a GPU, and CUDA sources compiled for it."""
    monkeypatch.setattr("growkernels.ops.backends.no_gpu", lambda: None)
    for plan in (basis_conv, splitting):
        monkeypatch.setattr(plan, "gpu", lambda device: CARDS["H100"])
    for plan in (eigen, virtual_grad):
        monkeypatch.setattr(plan, "cuda_obstacle", lambda family, device: None)


# For bfloat16 and float64.
ON_AN_H100 = {
    "virtual_grad_norms": ("cuda", "aten"),
    "virtual_grads": ("cuda", "aten"),
    "virtual_grad_norms[conv2d_relu]": ("aten", "aten"),
    "virtual_grads[conv2d_relu]": ("aten", "aten"),
    "virtual_grad_norms[linear]": ("aten", "aten"),
    "virtual_grads[linear]": ("aten", "aten"),
    "basis_conv2d[3x3]": ("triton", "two convolutions"),
    "basis_conv2d[1x1]": ("triton", "two convolutions"),
    "splitting_weight": ("triton", "aten"),
    "splitting_hvp": ("fused", "aten"),
    "splitting_hvp_conv2d[3x3]": ("projected", "aten"),
    "splitting_hvp_conv2d": ("projected", "aten"),
    "symmetric_eigs": (None, "cuda"),
}


@pytest.mark.usefixtures("h100")
def test_info_on_a_gpu() -> None:
    printed = {
        op: tuple(choose_backend(op, "cuda", d) for d in (torch.bfloat16, torch.float64))
        for op in EXAMPLES
    }
    backends_of = {op: tuple(chosen.backend for chosen in both) for op, both in printed.items()}
    assert backends_of == ON_AN_H100
    for op, both in printed.items():
        for chosen in both:
            names = list(EXAMPLES[op].backends)
            before = names[: names.index(chosen.backend)] if chosen.backend else names
            assert [name for name, _ in chosen.refused] == before


def test_without_bfloat16_tiles_the_portable_loops_run() -> None:
    """In a process of its own: the switch is read once."""
    program = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    finished = subprocess.run(
        [*program, "-k", "linear_positions or splitting_products"],
        env={**os.environ, "GROWKERNELS_BFLOAT16_TILES": "none"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
