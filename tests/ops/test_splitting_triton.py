"""The family's Triton kernels against its oracle, on CPU tensors under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples.numbers import LAYOUTS, relative
from op_samples.splitting import ACTIVATIONS, convolution, plain_convolution, plain_product
from op_samples.splitting import product as sample
from torch import Tensor
from triton_interpreter import rounded_to_tf32

from growkernels.ops.gpu_support import Gpu
from growkernels.ops.splitting import gpu, plan, reference, triton_launch
from growkernels.ops.splitting.triton_tiles import (
    COMBINE,
    FUSED,
    PROJECT,
    Tile,
    choose_splits,
    fused_tile,
    rows_per_pass,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; see tests/gpu"
)

KINDS = {
    "16 bit": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
}
CONFIGURATIONS = [
    (tile, dtype) for (_, kind), tiles in FUSED.items() for tile in tiles for dtype in KINDS[kind]
]
SMALL = Tile(16, 16, 16, 1, 4, 2, 1)
H100 = Gpu((9, 0), 132, 227 * 1024, True)

# Odd everywhere: images, filters of every neuron, strides, padding, dilation.
CONVOLUTION = convolution((2, 3, 7, 6), (5, 2, 3, 2), (2, 1), (1, 2), (1, 2))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def check(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """An error of at most twice plain torch's, and every element written."""
    assert not actual.isnan().any()
    slack = torch.finfo(actual.dtype).eps * (16 if actual.dtype == torch.float64 else 0.5)
    assert relative(actual, exact) <= 2 * relative(plain, exact) + slack


def fused(product: triton_launch.Product, v: Tensor, tile: Tile, programs: int = 2) -> Tensor:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    triton_launch.fused(product, out, tile, "ieee", programs)
    return out


def projected(product: triton_launch.Product, v: Tensor, project: Tile, combine: Tile) -> Tensor:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    triton_launch.projected(product, out, project, combine, 1)
    return out


def exact_product(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return reference.splitting_hvp(x.double(), w.double(), v.double())


@pytest.mark.parametrize(("tile", "dtype"), CONFIGURATIONS, ids=str)
def test_every_tile_of_the_fused_kernel(tile: Tile, dtype: torch.dtype) -> None:
    x, w, v = sample(tile.block_m + 5, 7, 1, tile.width - 3).tensors(dtype)
    actual = fused(triton_launch.linear_product(x, w, v), v, tile)
    check(actual, exact_product(x, w, v), plain_product(x, w, v))


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("dtype", KINDS["16 bit"], ids=str)
def test_every_tile_of_the_two_kernels(generation: int, dtype: torch.dtype) -> None:
    project, combine = PROJECT[generation], COMBINE[generation]
    x, w, v = sample(project.block_m + 5, 7, 2, combine.block_d + 3).tensors(dtype)
    actual = projected(triton_launch.linear_product(x, w, v), v, project, combine)
    check(actual, exact_product(x, w, v), plain_product(x, w, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (37, 20, 3, 16), (50, 17, 1, 33)], ids=str)
def test_blocks_of_samples_neurons_and_columns(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x, w, v = sample(*shape).tensors(dtype)
    product = triton_launch.linear_product(x, w, v)
    exact, plain = exact_product(x, w, v), plain_product(x, w, v)
    three_chunks = Tile(16, 16, 16, 3, 4, 2, 1)
    check(fused(product, v, three_chunks, programs=40), exact, plain)
    check(projected(product, v, SMALL, SMALL), exact, plain)


def test_tf32_rounds_to_nearest() -> None:
    """Tensor cores would cut the mantissas off."""
    x, w, v = sample(70, 9, 2, 40).tensors(torch.float32)
    rows, vectors = rounded_to_tf32(x), rounded_to_tf32(v)
    products = torch.einsum("md,nkd->mnk", rows, vectors) * w[:, :, None]
    expected = torch.einsum("mnk,md->nkd", rounded_to_tf32(products.float()), rows)
    out = torch.empty_like(v)
    tile = Tile(16, 16, 16, 3, 4, 2, 1)
    triton_launch.fused(triton_launch.linear_product(x, w, v), out, tile, "tf32", 2)
    assert relative(out, expected) < 2e-5


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
def test_tf32_keeps_every_nan(bits: int) -> None:
    x, w, v = sample(20, 3, 1, 11).tensors(torch.float32)
    w[4, 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = torch.empty_like(v)
    triton_launch.fused(triton_launch.linear_product(x, w, v), out, SMALL, "tf32", 2)
    assert out.isnan().all(1).tolist() == [False, True, False]


def test_passes_over_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, v = sample(70, 18, 1, 20).tensors(torch.float16)
    monkeypatch.setattr("growkernels.ops.splitting.triton_tiles._PASS_BYTES", 18 * 2 * 30)
    assert rows_per_pass(70, 18 * 2, 16) == 32
    actual = projected(triton_launch.linear_product(x, w, v), v, SMALL, SMALL)
    check(actual, exact_product(x, w, v), plain_product(x, w, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vectors", [1, 2])
def test_wide_products_keep_16_bits(vectors: int, dtype: torch.dtype) -> None:
    x, w = randn(41, 11, dtype=dtype), randn(41, 18, dtype=dtype, seed=1)
    v = randn(18, vectors, 11, seed=2)
    y = triton_launch.WideProduct(x, w, SMALL, SMALL, 2)(v)
    assert y.dtype == torch.float32
    assert relative(y, exact_product(x, w, v)) < 2**-16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vectors", [1, 2])
def test_convolutions(vectors: int, dtype: torch.dtype) -> None:
    call = convolution((2, 3, 7, 6), (5, vectors, 3, 2), (2, 1), (1, 2), (1, 2))
    (x, w, v), params = call.tensors(dtype), call.arguments
    exact = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), **params)
    plain = plain_convolution(x, w, v, **params)
    product = triton_launch.patch_product(x, w, v, *map(list, params.values()))
    check(fused(product, v, Tile(16, 16, 16, 2, 4, 2, 1)), exact, plain)
    check(projected(product, v, SMALL, SMALL), exact, plain)
    images = x.contiguous(memory_format=torch.channels_last)
    same = triton_launch.patch_product(images, w, v, *map(list, params.values()))
    assert same.x.data_ptr() == images.data_ptr()
    assert fused(same, v, SMALL._replace(block_d=32)).equal(
        fused(product, v, SMALL._replace(block_d=32))
    )


def test_filters_of_one_tap_are_matrices() -> None:
    call = convolution((2, 5, 3, 4), (6, 2, 1, 1), (1, 1), (0, 0), (1, 1))
    (x, w, v), params = call.tensors(torch.float32), call.arguments
    product = triton_launch.patch_product(x, w, v, *map(list, params.values()))
    assert product.patches is None
    exact = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), **params)
    check(fused(product, v, SMALL), exact, plain_convolution(x, w, v, **params))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    x, w, v = (LAYOUTS[layout](t) for t in sample(40, 9, 2, 11).tensors(torch.float32))
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (x, w, v)]
    actual = fused(triton_launch.linear_product(x, w, v), v, SMALL)
    assert actual.equal(fused(triton_launch.linear_product(*plain), plain[2], SMALL))


def test_w_is_read_where_it_lies() -> None:
    x, w, v = sample(40, 9, 1, 11).tensors(torch.float32)
    turned = w.t().contiguous().t()
    product = triton_launch.linear_product(x, turned, v)
    assert product.w.data_ptr() == turned.data_ptr()
    assert fused(product, v, SMALL).equal(fused(triton_launch.linear_product(x, w, v), v, SMALL))


def test_the_same_call_gives_the_same_bits_and_nan_comes_through() -> None:
    x, w, v = sample(70, 20, 1, 12).tensors(torch.float32)
    product = triton_launch.linear_product(x, w, v)
    first = fused(product, v, SMALL, programs=8)
    assert first.equal(fused(product, v, SMALL, programs=8))
    w[3, 7] = float("nan")
    y = fused(triton_launch.linear_product(x, w, v), v, SMALL)
    assert y[7].isnan().all()
    assert not y[:7].isnan().any()
    assert not y[8:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weights(name: str, dtype: torch.dtype) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    grad, z = randn(23, 129, dtype=dtype), 3 * randn(23, 129, dtype=dtype, seed=1)
    out = torch.empty_like(z)
    triton_launch.splitting_weight(grad, z, out, activation, beta)
    exact = reference.splitting_weight(grad.double(), z.double(), activation, beta=beta)
    check(out, exact, reference.splitting_weight(grad, z, activation, beta=beta))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_weights_in_the_tails(name: str) -> None:
    activation, beta, _ = ACTIVATIONS[name]
    z = torch.tensor([-1e4, -200.0, -40.0, -9.0, 9.0, 40.0, 200.0, 1e4, float("nan")])
    out = torch.empty_like(z)
    triton_launch.splitting_weight(torch.ones(9), z, out, activation, beta)
    torch.testing.assert_close(
        out,
        torch.ops.growkernels.splitting_weight(torch.ones(9), z, activation, beta),
        rtol=1e-4,
        atol=1e-37,
        equal_nan=True,
    )


# --- what is registered for CUDA tensors, called on others


@pytest.fixture
def hopper(pass_for_gpu: Callable[..., None]) -> None:
    """Makes the machine's CPU pass for a small GPU."""
    pass_for_gpu(gpu, plan, H100._replace(multiprocessors=2))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("width", [24, 400])
def test_the_registered_products(width: int) -> None:
    x, w, v = sample(70, 5, 1, width).tensors(torch.bfloat16)
    actual = gpu.splitting_hvp(x, w, v)
    assert actual.shape == v.shape
    check(actual, exact_product(x, w, v), plain_product(x, w, v))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_registered_convolution(dtype: torch.dtype) -> None:
    (x, w, v), params = CONVOLUTION.tensors(dtype), CONVOLUTION.arguments
    actual = gpu.splitting_hvp_conv2d(x, w, v, *map(list, params.values()))
    exact = reference.splitting_hvp_conv2d(x.double(), w.double(), v.double(), **params)
    check(actual, exact, plain_convolution(x, w, v, **params))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_registered_weights_keep_layout_and_take_any_strides(dtype: torch.dtype) -> None:
    z = randn(2, 5, 3, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    grad = randn(2, 5, 4, 3, dtype=dtype, seed=1).transpose(2, 3)
    rows, expanded = randn(7, 6, dtype=dtype)[:, ::2], randn(1, 3, dtype=dtype).expand(7, 3)
    for g, preact in ((grad, z), (expanded, rows)):
        actual = gpu.splitting_weight(g, preact, "gelu", None)
        assert actual.stride() == torch.empty_like(preact).stride()
        exact = reference.splitting_weight(g.double(), preact.double(), "gelu")
        check(actual, exact, reference.splitting_weight(g, preact, "gelu"))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_zero_sizes(sizes: tuple[int, int, int]) -> None:
    rows, width, n = sizes
    x, w, v = torch.ones(rows, width), torch.ones(rows, n), torch.ones(n, width)
    y = gpu.splitting_hvp(x, w, v)
    assert y.shape == v.shape
    assert y.eq(0).all()
    assert gpu.splitting_weight(w[:0], w[:0], "gelu", None).shape == (0, n)


@pytest.mark.usefixtures("hopper")
def test_bad_input_is_refused_in_the_words_of_the_other_backends() -> None:
    x, w, v = torch.ones(5, 4), torch.ones(5, 3), torch.ones(3, 4)
    calls: list[tuple[str, Callable[[], object]]] = [
        (r"splitting_hvp: v holds", lambda: gpu.splitting_hvp(x, w, v[:, 1:])),
        (r"unknown activation", lambda: gpu.splitting_weight(w, w, "no", None)),
        (r"x has shape", lambda: gpu.splitting_hvp_conv2d(x, w, v, *([[1, 1]] * 3))),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_without_triton_it_is_aten(pass_for_gpu: Callable[..., None]) -> None:
    pass_for_gpu(gpu, plan, H100._replace(triton=False))
    x, w, v = sample(20, 5, 1, 8).tensors(torch.bfloat16)
    chosen = gpu.plan_hvp(x, w, v)
    assert chosen.backend == "aten"
    assert dict(chosen.refused)["fused"] == "Triton is not installed"
    check(gpu.splitting_hvp(x, w, v), exact_product(x, w, v), plain_product(x, w, v))
    assert gpu.splitting_weight(w, w, "gelu", None).dtype == torch.bfloat16


def test_wide_products_start_on_the_gpu_that_has_the_tensors(
    current_gpu: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current one, whatever the tensors are on."""
    started: list[Tensor] = []

    def two_products(product: triton_launch.Product, *arguments: object) -> Tensor:
        started.append(current_gpu[-1])
        return torch.zeros(1, 3, 2, 11)

    monkeypatch.setattr(triton_launch, "_two_products", two_products)
    v = torch.ones(3, 1, 11)
    triton_launch.WideProduct(torch.ones(5, 11).bfloat16(), torch.ones(5, 3), SMALL, SMALL, 2)(v)
    assert [tensor is v for tensor in started] == [True]


# --- which kernels run

CHOICES: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "fused", None),
    ({"dtype": torch.float16}, "fused", None),
    ({"width": 385}, "projected", "385 columns do not fit into registers; 384 do"),
    ({"width": 300, "gpu": H100._replace(capability=(8, 0))}, "projected", "256 do"),
    ({"dtype": torch.float32, "width": 64}, "fused", None),
    ({"dtype": torch.float32, "width": 65}, "aten", "64 do"),
    ({"dtype": torch.float32, "tf32": True, "width": 128}, "fused", None),
    ({"dtype": torch.float32, "tf32": True, "width": 129}, "aten", "128 do"),
    ({"dtype": torch.float32, "patches": True, "width": 9}, "aten", "setting of TF32"),
    ({"dtype": torch.float64}, "aten", "float64 is left"),
    ({"gpu": H100._replace(capability=(7, 5))}, "aten", "is an sm_75; the kernels need sm_80"),
    ({"rows": 2**31}, "aten", "counted in 32 bits"),
    ({"patches": True, "width": 576}, "projected", "576 columns"),
]


@pytest.mark.parametrize(("change", "backend", "reason"), CHOICES, ids=str)
def test_the_choice_and_its_reasons(
    change: dict[str, Any], backend: str, reason: str | None
) -> None:
    request = {
        "rows": 50432, "width": 384, "dtype": torch.bfloat16, "gpu": H100, "tf32": False,
    }  # fmt: skip
    chosen = plan.plan_products(**{**request, **change})
    assert chosen.backend == backend
    assert isinstance(chosen.parameters, plan.Fused) == (backend == "fused")
    assert (chosen.parameters is None) == (backend == "aten")
    if reason is None:
        assert chosen.refused == ()
    else:
        assert any(reason in why for _, why in chosen.refused)
        assert backend not in dict(chosen.refused)


@pytest.mark.usefixtures("hopper")
def test_float32_follows_torchs_setting_of_tf32() -> None:
    call = sample(100, 5, 1, 64).tensors(torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert gpu.plan_hvp(*call).parameters.precision == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert gpu.plan_hvp(*call).parameters.precision == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_tiles_are_listed_from_narrow_to_wide() -> None:
    for (generation, kind), tiles in FUSED.items():
        widths = [tile.width for tile in tiles]
        assert widths == sorted(set(widths))
        for width in range(1, widths[-1] + 1):
            tile = fused_tile((generation // 10, generation % 10), kind, width)
            assert tile is not None
            assert tile.width >= width


@pytest.mark.parametrize("columns", [1, 12, 48, 131, 133, 1000])
@pytest.mark.parametrize("rows", [1, 63, 64, 6304, 50432])
def test_splits_cover_the_samples_and_fill_the_gpu(columns: int, rows: int) -> None:
    splits, per_split = choose_splits(columns, rows, 64, 132)
    assert per_split % 64 == 0
    assert (splits - 1) * per_split < rows <= splits * per_split
    if rows == 50432 and columns <= 132:
        assert columns * splits > 100


def test_deit_fills_an_h100_in_one_wave() -> None:
    assert choose_splits(1536 // 128, 50432, 32, 132)[0] == 11
