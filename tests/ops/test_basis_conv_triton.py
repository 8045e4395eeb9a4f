"""The Triton kernels of basis_conv, run by Triton's interpreter on CPU tensors.

With a GPU visible, tests/gpu/test_basis_conv.py runs them there instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("a GPU is visible: tests/gpu runs these kernels on it", allow_module_level=True)

from op_samples.basis_conv import BEYOND_32_BITS, CHOSEN, FORMATS, Shape
from triton_interpreter import rounded_to_tf32

from growkernels.ops.basis_conv import gpu, reference
from growkernels.ops.basis_conv import plan as plans
from growkernels.ops.basis_conv import triton_launch as launch
from growkernels.ops.basis_conv import triton_tiles as tiles
from growkernels.ops.gpu_support import Gpu
from growkernels.ops.plan import Plan

# 2^-9 is bfloat16's rounding error, 2^-12 float16's and TF32's. Coefficients and maps are rounded
# before they are multiplied, results after.
ERROR = {torch.float64: 1e-14, torch.float32: 6e-4, torch.float16: 8e-4, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORWARD_TILES = [(dtype, tile) for dtype in DTYPES for tile in tiles.FORWARD_TILES[dtype.itemsize]]
BACKWARD_TILES = [
    (dtype, tile) for dtype in DTYPES for tile in tiles.BACKWARD_TILES[dtype.itemsize]
]

SHAPES = [
    Shape((2, 5, 7, 6), 6, 7),
    Shape((1, 1, 1, 1), 1, 1, (1, 1), padding=(0, 0)),
    Shape((3, 16, 8, 8), 16, 16),
    Shape((2, 6, 9, 8), 4, 5, stride=(2, 2)),
    Shape((2, 70, 5, 3), 20, 47, padding=(2, 2)),
    Shape((2, 6, 9, 8), 4, 9, padding=(2, 3), dilation=(2, 3)),
    Shape((2, 16, 8, 8), 8, 24, (1, 1), (2, 2), (0, 0)),
    Shape((1, 3, 12, 10), 33, 2, (2, 3), (2, 1), (1, 0), (1, 2)),
    Shape((2, 3, 6, 7), 3, 4, (5, 5), padding=(2, 2)),
]


class Call(NamedTuple):
    """The tensors of one call, and the oracle's results for them in float64."""

    x: Tensor
    basis: Tensor
    coeff: Tensor
    bias: Tensor | None
    y: Tensor
    z: Tensor


def make(
    shape: Shape,
    dtype: torch.dtype,
    include_basis: bool,
    bias: bool = True,
    memory_format: torch.memory_format = torch.channels_last,
) -> Call:
    generator = torch.Generator().manual_seed(0)
    outputs = shape.mixed + (shape.filters if include_basis else 0)
    x = torch.randn(shape.x, generator=generator).to(dtype, memory_format=memory_format)
    basis = torch.randn(shape.filters, shape.x[1], *shape.kernel, generator=generator).to(dtype)
    coeff = torch.randn(shape.mixed, shape.filters, generator=generator).to(dtype)
    offset = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    exact = [None if t is None else t.double() for t in (x, basis, coeff, offset)]
    y = reference.basis_conv2d(*exact, *shape.form, include_basis)
    z = torch.nn.functional.conv2d(exact[0], exact[1], None, *shape.form)
    return Call(x, basis, coeff, offset, y, z)


def unwritten(like: Tensor, dtype: torch.dtype, name: str = "channels_last") -> Tensor:
    """NaN wherever nothing is written (see conftest's `repeatable`)."""
    tensor = torch.empty(like.shape, dtype=dtype, memory_format=FORMATS[name])
    assert tensor.isnan().all()
    return tensor


def assert_close(actual: Tensor | None, expected: Tensor, scale: float = 1.0) -> None:
    assert actual is not None
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= scale * ERROR[actual.dtype], f"relative error {error:.1e}"


def forward(algorithm: str, call: Call, shape: Shape, y: Tensor, z: Tensor | None) -> None:
    """As on a GPU of 4 multiprocessors."""
    chosen = plans.Tiles(tile_for(shape, y, 4), None, 4)
    gpu.forward(algorithm == "triton", chosen, *call[:4], shape.form, y, z)


def tile_for(shape: Shape, y: Tensor, multiprocessors: int = 1) -> tiles.ForwardTile:
    return tiles.forward_tile(shape.filters, y.numel() // y.shape[1], y.dtype, multiprocessors)


class TestForward:
    @pytest.mark.parametrize("include_basis", [True, False])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape: Shape, include_basis: bool) -> None:
        call = make(shape, torch.float32, include_basis)
        few = 5 if call.y.numel() < 10 else 1  # values, of which one may be a small difference
        for algorithm in ("triton", "direct"):
            y, z = unwritten(call.y, torch.float32), unwritten(call.z, torch.float32)
            forward(algorithm, call, shape, y, z)
            assert_close(y, call.y, few)
            assert_close(z, call.z)

    @pytest.mark.parametrize(("dtype", "tile"), FORWARD_TILES)
    def test_tiles(self, dtype: torch.dtype, tile: tiles.ForwardTile) -> None:
        # Two programs, two steps over input channels and several over combinations, all ragged.
        channels, mixed = tile.depth(dtype) + 3, tile.combinations + 5
        shape = Shape((2, channels, 9, 11), tile.filters - 3, mixed, (1, 2), padding=(0, 0))
        call = make(shape, dtype, include_basis=True)
        y = unwritten(call.y, dtype)
        launch.convolve(*call[:4], *shape.form, y, None, tile)
        assert_close(y, call.y)
        y = unwritten(call.y, dtype)
        launch.mix(call.z.to(dtype), call.coeff, call.bias, y, tile)
        assert_close(y, call.y)

    @pytest.mark.parametrize("tile", tiles.ROW_TILES[2])
    @pytest.mark.parametrize(
        ("size", "height", "padding", "dilation"),
        [((9, 16), 3, 1, 1), ((8, 8), 3, 1, 1), ((6, 1), 2, 0, 2), ((7, 128), 1, 2, 1)],
    )
    def test_whole_rows(
        self,
        size: tuple[int, int],
        height: int,
        padding: int,
        dilation: int,
        tile: tiles.ForwardTile,
    ) -> None:
        dtype = torch.bfloat16
        shape = Shape(
            (3, tile.depth(dtype) + 3, *size), tile.filters - 3, tile.combinations + 5,
            (height, 3), padding=(padding, 1), dilation=(dilation, 1),
        )  # fmt: skip
        call = make(shape, dtype, include_basis=True)
        y, z = unwritten(call.y, dtype), unwritten(call.z, dtype)
        launch.convolve(*call[:4], *shape.form, y, z, tile)
        assert_close(y, call.y)
        assert_close(z, call.z)

    def test_whole_rows_are_taken_where_they_fit(self) -> None:
        for row, expected in ((16, True), (64, True), (28, False), (256, False), (None, False)):
            tile = tiles.forward_tile(64, 2**20, torch.bfloat16, 132, row)
            assert tile.whole_rows == expected
        assert not tiles.forward_tile(64, 8192, torch.bfloat16, 132, 16).whole_rows
        assert not tiles.forward_tile(64, 2**20, torch.float32, 132, 16).whole_rows

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_maps_beside_mixed_channels(self, dtype: torch.dtype, bias: bool) -> None:
        shape = SHAPES[4]
        call = make(shape, dtype, include_basis=False, bias=bias)
        for algorithm in ("triton", "direct"):
            y, z = unwritten(call.y, dtype), unwritten(call.z, dtype)
            forward(algorithm, call, shape, y, z)
            assert_close(y, call.y)
            assert_close(z, call.z)

    @pytest.mark.parametrize("of_outputs", FORMATS)
    @pytest.mark.parametrize("of_images", [*FORMATS, "slice of channels"])
    def test_layouts(self, of_images: str, of_outputs: str) -> None:
        shape = SHAPES[0]
        call = make(shape, torch.float32, include_basis=True)
        if of_images in FORMATS:
            x = call.x.contiguous(memory_format=FORMATS[of_images])
        else:
            x = torch.cat([call.x, call.x], 1)[:, shape.x[1] :]
        for algorithm in ("triton", "direct"):
            y = unwritten(call.y, torch.float32, of_outputs)
            forward(algorithm, call._replace(x=x), shape, y, None)
            assert_close(y, call.y)
            assert y.stride() == unwritten(call.y, torch.float32, of_outputs).stride()

    @pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_no_other_position_sees_what_is_not_finite(self, value: float) -> None:
        """Nor do channels that only fill up the tile turn infinity into NaN."""
        shape = Shape((1, 3, 6, 6), 3, 4)
        call = make(shape, torch.float32, include_basis=True)
        call.x[0, :, 0, 0] = value
        finite = torch.ones(6, 6, dtype=torch.bool)
        finite[:2, :2] = False
        y = unwritten(call.y, torch.float32)
        positive = call.x, call.basis.abs(), call.coeff.abs()
        launch.convolve(*positive, None, *shape.form, y, None, tile_for(shape, y))
        assert y[..., finite].isfinite().all()
        assert torch.equal(y.isnan(), (~finite).expand(y.shape) & math.isnan(value))

    def test_tf32_rounds_to_nearest(self) -> None:
        """Tensor cores would cut the mantissas off."""
        call = make(SHAPES[0], torch.float32, include_basis=True)
        x, basis, coeff = map(rounded_to_tf32, call[:3])
        z = torch.nn.functional.conv2d(x, basis, None, *SHAPES[0].form)
        rest = torch.einsum("or,nrhw->nohw", coeff, rounded_to_tf32(z.float()))
        expected = torch.cat([z, rest], 1)
        y = unwritten(call.y, torch.float32)
        launch.convolve(*call[:3], None, *SHAPES[0].form, y, None, tile_for(SHAPES[0], y))
        assert (y - expected).norm() < 2e-5 * expected.norm()

    @pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
    def test_tf32_keeps_every_nan(self, bits: int) -> None:
        call = make(SHAPES[0], torch.float32, include_basis=True)
        call.x[0, 0, 0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        y = unwritten(call.y, torch.float32)
        launch.convolve(*call[:3], None, *SHAPES[0].form, y, None, tile_for(SHAPES[0], y))
        assert y[0, :, 0, 0].isnan().all()
        assert not y[1].isnan().any()


class TestBackward:
    @staticmethod
    def tiles(call: Call) -> plans.Tiles:
        tile = tiles.backward_tile(call.coeff.shape[1], len(call.coeff), call.coeff.dtype)
        return plans.Tiles(tiles.FORWARD_TILES[4][0], tile, 2)

    def gradients(
        self,
        call: Call,
        dtype: torch.dtype,
        include_basis: bool,
        tile: tiles.BackwardTile | None = None,
        wanted: tuple[bool, bool, bool] = (True, True, True),
        multiprocessors: int = 2,
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Of z, coeff and bias: what the kernel writes, and what the definition says."""
        filters = call.basis.shape[0]
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(call.y.shape, generator=generator).to(dtype)
        z = (call.y[:, :filters] if include_basis else call.z).to(dtype)
        z_bias = call.bias[:filters] if include_basis and call.bias is not None else None
        targets = (call.z, call.coeff, torch.empty(call.y.shape[1]))
        dz, dcoeff, dbias = (
            (torch.empty(t.shape, dtype=dtype) if t.dim() < 4 else unwritten(t, dtype))
            if w
            else None
            for t, w in zip(targets, wanted, strict=True)
        )
        tile = tile or tiles.backward_tile(filters, len(call.coeff), dtype)
        assert tile is not None
        launch.coefficient_backward(
            grad, z, z_bias, call.coeff, dz, dcoeff, dbias, multiprocessors, tile
        )
        g, maps = grad.double(), z.double()
        if z_bias is not None:
            maps = maps - z_bias.double()[:, None, None]
        rest = g[:, g.shape[1] - len(call.coeff) :]
        expected = torch.einsum("or,nohw->nrhw", call.coeff.double(), rest)
        if include_basis:
            expected = expected + g[:, :filters]
        products = torch.einsum("nohw,nrhw->or", rest, maps)
        return [dz, dcoeff, dbias], [expected, products, g.sum((0, 2, 3))]

    @pytest.mark.parametrize(("dtype", "tile"), BACKWARD_TILES)
    def test_tiles(self, dtype: torch.dtype, tile: tiles.BackwardTile) -> None:
        include_basis = dtype != torch.float16
        shape = Shape((2, 2, 9, 9), tile.filters - 3, tile.combinations - 5)
        call = make(shape, dtype, include_basis)
        actual, expected = self.gradients(call, dtype, include_basis, tile)
        for ours, exact in zip(actual, expected, strict=True):
            assert_close(ours, exact)

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_one_gradient_alone(self, index: int) -> None:
        call = make(SHAPES[0], torch.float32, include_basis=True)
        wanted = tuple(i == index for i in range(3))
        actual, expected = self.gradients(call, torch.float32, True, wanted=wanted)
        assert_close(actual[index], expected[index])
        assert all(actual[i] is None for i in range(3) if i != index)

    @pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
    def test_any_number_of_programs(self, multiprocessors: int) -> None:
        call = make(Shape((3, 2, 13, 12), 6, 7), torch.float32, include_basis=True)
        actual, expected = self.gradients(
            call, torch.float32, True, multiprocessors=multiprocessors
        )
        again, _ = self.gradients(call, torch.float32, True, multiprocessors=multiprocessors)
        for ours, same, exact in zip(actual, again, expected, strict=True):
            assert_close(ours, exact)
            assert ours is not None
            assert same is not None
            assert torch.equal(ours, same)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("include_basis", [True, False])
    @pytest.mark.parametrize(
        "shape", [SHAPES[0], SHAPES[3], Shape((1, 4, 5, 6), 129, 130)], ids=str
    )
    def test_all_gradients(self, shape: Shape, include_basis: bool, bias: bool) -> None:
        """By the kernel, and by matrix products for the shape that no tile has room for."""
        call = make(shape, torch.float32, include_basis, bias)
        grad = torch.randn(call.y.shape)
        leaves = [t.double().requires_grad_() for t in call[:4] if t is not None]
        arguments = [*leaves, *([] if bias else [None])]
        y = reference.basis_conv2d(*arguments, *shape.form, include_basis)
        expected = torch.autograd.grad(y, leaves, grad.double())
        saved = call.y[:, : shape.filters] if include_basis else call.z
        z_bias = call.bias[: shape.filters] if include_basis and call.bias is not None else None
        gradients = gpu.backward(
            self.tiles(call), grad, call.x, call.basis, call.coeff, saved.float(), z_bias,
            shape.form, torch.empty_like(call.coeff), torch.empty(len(grad[0])) if bias else None,
            (True, True),
        )  # fmt: skip
        for ours, exact in zip(gradients, expected, strict=False):
            assert_close(ours, exact)
        assert (gradients[3] is None) == (not bias)
        assert gradients[0] is not None
        assert gradients[1] is not None
        assert gradients[0].stride() == call.x.stride()
        assert gradients[1].stride() == call.basis.stride()

    def test_nothing_that_is_not_wanted(self) -> None:
        call = make(SHAPES[0], torch.float32, include_basis=True)
        gradients = gpu.backward(
            self.tiles(call), torch.randn(call.y.shape), *call[:3], call.z.float(), None,
            SHAPES[0].form, None, None, (False, True),
        )  # fmt: skip
        assert [gradient is None for gradient in gradients] == [True, False, True, True]


H100 = Gpu((9, 0), 132, 227 * 1024, True)
RTX_2080 = Gpu((7, 5), 46, 64 * 1024, True)
RTX_4090 = Gpu((8, 9), 128, 99 * 1024, True)


class TestDecision:
    @staticmethod
    def stage(number: int, images: int, fraction: float = 0.5) -> tuple[tuple[int, ...], ...]:
        """Shapes of a 3x3 convolution in ResNet-18 on CIFAR."""
        channels, size = 32 * 2**number, 64 // 2**number
        filters = int(fraction * channels)
        images_and_channels = (images, channels, size, size)
        return images_and_channels, (filters, channels, 3, 3), (channels - filters, filters)

    @pytest.mark.parametrize("images", [128, 512])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_resnet(self, images: int, dtype: torch.dtype) -> None:
        algorithms = [
            plans.plan_on_gpu(*self.stage(n, images), dtype, H100, padding=(1, 1)).backend
            for n in (1, 2, 3, 4)
        ]
        assert algorithms == ["triton", "triton", "direct", "direct"]

    def decision(self, **changes: object) -> Plan:
        x, basis, coeff = self.stage(2, 128)
        arguments = {
            "x": x, "basis": basis, "coeff": coeff, "dtype": torch.bfloat16, "gpu": H100,
            "padding": (1, 1),
        }  # fmt: skip
        return plans.plan_on_gpu(**{**arguments, **changes})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changes", "algorithm", "reason"),
        [
            ({}, "triton", None),
            ({"dtype": torch.float64}, "two convolutions", "not float64"),
            ({"dtype": torch.float32, "tf32": False}, "two convolutions", "TF32 is off"),
            ({"gpu": H100._replace(triton=False)}, "two convolutions", "not installed"),
            ({"gpu": RTX_2080}, "two convolutions", "an sm_75; the kernels need sm_80"),
            ({"x": (0, 128, 16, 16)}, "two convolutions", "no images"),
            ({"coeff": (0, 64)}, "two convolutions", "nothing to mix"),
            ({"x": (4, 128, 16, 16)}, "direct", "1024 positions make 16 programs"),
            (
                {"basis": (120, 128, 3, 3), "coeff": (128, 120), "include_basis": False},
                "reconstruct", "120 of 128",
            ),
            ({"basis": (112, 128, 3, 3), "coeff": (16, 112)}, "direct", "too little to save"),
            ({"basis": (40, 128, 3, 3), "coeff": (88, 40)}, "direct", "64 columns"),
            (
                {"basis": (257, 128, 3, 3), "coeff": (900, 257)},
                "two convolutions", "257 filters do not fit",
            ),
            (
                {"basis": (256, 512, 1, 1), "coeff": (512, 256), "x": (128, 512, 16, 16),
                 "padding": (0, 0), "gpu": RTX_4090},
                "two convolutions", "256 filters do not fit into one program, 128 do",
            ),
            (
                {"basis": (65, 128, 3, 3), "coeff": (128, 65), "dtype": torch.float32,
                 "gpu": RTX_4090},
                "two convolutions", "65 filters do not fit into one program, 64 do",
            ),
            (
                {"x": (2**15, 1, 2**8, 2**8), "basis": (1, 1, 1, 1), "coeff": (1, 1),
                 "padding": (0, 0)},
                "two convolutions", "2147483648 positions are more",
            ),
        ],
    )  # fmt: skip
    def test_reasons(self, changes: dict[str, object], algorithm: str, reason: str | None) -> None:
        chosen = self.decision(**changes)
        assert chosen.backend == algorithm
        assert (chosen.parameters is None) == (algorithm not in ("triton", "direct"))
        order = ["triton", "direct", "reconstruct", "two convolutions"]
        refused = order[: order.index(algorithm)]
        assert [name for name, _ in chosen.refused] == refused
        assert reason is None or reason in dict(chosen.refused)["triton"]

    @pytest.mark.parametrize("shape", [*CHOSEN, BEYOND_32_BITS], ids=str)
    def test_tests_on_a_gpu_run_the_kernels_they_mean(self, shape: Shape) -> None:
        basis, coeff = (shape.filters, shape.x[1], *shape.kernel), (shape.mixed, shape.filters)
        for dtype in DTYPES:
            chosen = plans.plan_on_gpu(shape.x, basis, coeff, dtype, H100, *shape.form)
            assert chosen.backend == "triton"

    def test_every_choice_of_triton_has_a_tile(self) -> None:
        for dtype in DTYPES:
            for filters in range(1, tiles.MOST_FILTERS + 1):
                tile = tiles.forward_tile(filters, 1000, dtype, 132)
                assert tile.filters >= filters

    def test_tiles_of_small_gpus_take_little_shared_memory(self) -> None:
        """By the figures for compute capability 8.0, which are those for 8.6, 8.9 and 12.0 too."""
        documented = (Path(__file__).parents[2] / "docs" / "gpu_kernels.md").read_text()
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            most = tiles.most_filters(dtype, RTX_4090.shared_bytes)
            row = rf"^\| `\w+ {name} \d+x(\d+)` \| \d \| \d+ \| 0 \| ([\d.]+) \| mma "
            section = documented.partition("`splitting`")[0]
            figures = re.findall(row, section, re.MULTILINE)
            assert {int(columns) for columns, _ in figures} >= {16, 32, 64, most}
            for columns, shared_kib in figures:
                assert int(columns) > most or float(shared_kib) * 1024 <= RTX_4090.shared_bytes

    def test_few_positions_get_small_programs(self) -> None:
        many, few = (tiles.forward_tile(64, n, torch.bfloat16, 132) for n in (32768, 8192))
        assert (many.positions, few.positions) == (128, 64)

    def test_registered_for_gpus(self) -> None:
        for op in ("", "_with_maps", "_backward", "_algorithm"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(
                f"growkernels::basis_conv2d{op}", "CUDA"
            )


class TestRegistration:
    """The functions that `register` hands to the dispatcher for GPUs, called with CPU tensors."""

    @pytest.fixture(autouse=True)
    def two_multiprocessors(self, pass_for_gpu: Callable[..., None]) -> None:
        pass_for_gpu(gpu, plans, H100._replace(multiprocessors=2))

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("include_basis", [True, False])
    @pytest.mark.parametrize("algorithm", ["triton", "direct", "two convolutions"])
    def test_forward_and_backward(
        self,
        algorithm: str,
        include_basis: bool,
        memory_format: str,
    ) -> None:
        shape = Shape((2, 5, 16, 6), 14 if algorithm == "triton" else 9, 25)
        dtype = torch.float64 if algorithm == "two convolutions" else torch.float32
        call = make(shape, dtype, include_basis, memory_format=FORMATS[memory_format])
        form = [list(pair) for pair in shape.form]
        arguments = [*call[:4], *form, include_basis]
        assert gpu.basis_conv2d_algorithm(*call[:3], *form, include_basis) == algorithm
        assert_close(gpu.basis_conv2d(*arguments), call.y)
        saved = call.y.to(dtype)[:, : shape.filters]
        if not include_basis:
            y, saved = gpu.basis_conv2d_with_maps(*arguments)
            assert_close(y, call.y)
            assert_close(saved, call.z)
        z_bias = call.bias[: shape.filters] if include_basis and call.bias is not None else None
        grad = torch.randn(call.y.shape).to(dtype)
        meta, ours = (
            op(grad, *call[:3], saved, z_bias, *form, include_basis, [True, True, True, True])
            for op in (self.fake_backward, gpu.basis_conv2d_backward)
        )
        leaves = [t.double().requires_grad_() for t in call[:4] if t is not None]
        y = reference.basis_conv2d(*leaves, *shape.form, include_basis)
        for ours_, fake, exact in zip(
            ours, meta, torch.autograd.grad(y, leaves, grad.double()), strict=True
        ):
            assert_close(ours_, exact)
            assert ours_.stride() == fake.stride()

    @staticmethod
    def fake_backward(*arguments: Any) -> Any:
        on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        return torch.ops.growkernels.basis_conv2d_backward(*on_meta)

    def test_gradients_that_are_not_wanted(self) -> None:
        shape = Shape((2, 5, 16, 6), 14, 25)
        call = make(shape, torch.float32, True)
        form = [list(pair) for pair in shape.form]
        y = call.y.float()
        gradients = gpu.basis_conv2d_backward(
            y, *call[:3], y[:, :14], None, *form, True, [False, False, True, False]
        )
        assert [gradient is None for gradient in gradients] == [True, True, False, True]

    @pytest.mark.parametrize("algorithm", ["triton", "direct"])
    def test_kernels_start_on_the_gpu_that_has_the_tensors(
        self,
        algorithm: str,
        current_gpu: list[Tensor],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Triton launches on the current one, whatever the tensors are on."""
        started: list[Tensor] = []

        def start(first: Tensor, *arguments: object) -> None:
            started.append(current_gpu[-1])

        for name in ("convolve", "mix", "coefficient_backward"):
            monkeypatch.setattr(launch, name, start)
        shape = Shape((2, 5, 16, 6), 14 if algorithm == "triton" else 9, 25)
        call = make(shape, torch.float32, True)
        form = [list(pair) for pair in shape.form]
        assert gpu.basis_conv2d_algorithm(*call[:3], *form, True) == algorithm
        y = gpu.basis_conv2d(*call[:4], *form, True)
        gpu.basis_conv2d_backward(
            y, *call[:3], y[:, : shape.filters], None, *form, True, [True] * 4
        )
        assert [tensor is call.x for tensor in started] == [True, True]

    def test_arguments_are_checked(self) -> None:
        call = make(SHAPES[0], torch.float32, True)
        form = [list(pair) for pair in SHAPES[0].form]
        for op in ("basis_conv2d", "basis_conv2d_algorithm"):
            bias = [] if op.endswith("algorithm") else [None]
            with pytest.raises(ValueError, match=r"basis has 4 input channels but x has 5"):
                getattr(gpu, op)(call.x, call.basis[:, :4], call.coeff, *bias, *form, True)
