"""BasisConv2d computes what its equivalent convolution does, and takes its place exactly."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.nn import BasisConv2d, Conv2dReLU
from growkernels.nn.kernel_factors import kernel_matrix, leading_rows_factors

INITS = [("svd", True), ("svd", False), ("select", False)]


def conv_of_rank(rank: int, channels: int = 12, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    """A convolution whose kernel matrix [channels, 5 * 9] has this rank."""
    conv = nn.Conv2d(5, channels, 3, stride=2, padding=1, dtype=torch.float64)
    matrix = torch.randn(channels, rank, dtype=torch.float64) @ torch.randn(
        rank, 45, dtype=torch.float64
    )
    conv.weight.data = matrix.view(conv.weight.shape) / 10
    return conv.to(dtype)


def kernel(conv: nn.Conv2d) -> Tensor:
    return conv.weight.detach().double().flatten(1)


def best_error(conv: nn.Conv2d, rank: int) -> float:
    return float(torch.linalg.svdvals(kernel(conv))[rank:].square().sum())


def error(conv: nn.Conv2d, approximation: BasisConv2d) -> float:
    return float((kernel(conv) - kernel(approximation.to_conv())).square().sum())


@pytest.mark.parametrize("include_basis", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "valid", "stride": 2},
    ],
)
def test_the_module_and_its_convolution_compute_the_same(
    geometry: dict[str, object], bias: bool, include_basis: bool
) -> None:
    layer = BasisConv2d(
        3,
        8,
        basis_channels=5,
        bias=bias,
        include_basis=include_basis,
        dtype=torch.float64,
        **geometry,  # type: ignore[arg-type]
    )
    conv = layer.to_conv()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), conv(x[0]), rtol=1e-12, atol=1e-12)
    reference = nn.Conv2d(3, 8, **geometry)  # type: ignore[arg-type]
    assert layer(x).shape == reference(x.float()).shape


@pytest.mark.parametrize(("init", "include_basis"), INITS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 6e-2)]
)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_kernel_of_low_rank_is_reproduced(
    rank: int, dtype: torch.dtype, tolerance: float, init: str, include_basis: bool
) -> None:
    conv = conv_of_rank(rank, dtype=dtype)
    layer = BasisConv2d.from_conv(conv, 6, init, include_basis)
    assert error(conv, layer) ** 0.5 <= tolerance * float(kernel(conv).norm())
    x = torch.randn(2, 5, 8, 8).to(dtype)
    expected, result = conv(x).detach().double(), layer(x).detach().double()
    assert float((result - expected).norm()) <= 2 * tolerance * float(expected.norm())


@pytest.mark.parametrize(("init", "include_basis"), INITS)
def test_all_filters_reproduce_any_kernel(init: str, include_basis: bool) -> None:
    """Also with more filters than a filter has weights, where the kernel has fewer rows of rank."""
    for conv in (nn.Conv2d(4, 7, 3), nn.Conv2d(2, 9, 1)):
        for basis_channels in {conv.out_channels, min(conv.out_channels, 8)}:
            layer = BasisConv2d.from_conv(conv, basis_channels, init, include_basis)
            if basis_channels >= kernel(conv).shape[1] or basis_channels == conv.out_channels:
                assert error(conv, layer) <= 1e-11 * float(kernel(conv).square().sum())


@pytest.mark.parametrize("basis_channels", [1, 5, 9])
def test_svd_without_the_basis_is_the_best_of_its_rank(basis_channels: int) -> None:
    conv = nn.Conv2d(5, 12, 3).double()
    layer = BasisConv2d.from_conv(conv, basis_channels, "svd", include_basis=False)
    assert error(conv, layer) == pytest.approx(best_error(conv, basis_channels), rel=1e-10)
    torch.testing.assert_close(layer.basis.norm(), layer.coeff.norm())


@pytest.mark.parametrize("basis_channels", [1, 5, 9])
def test_svd_with_the_basis_is_nearly_the_best_and_well_conditioned(basis_channels: int) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        conv = nn.Conv2d(5, 12, 3).double()
        layer = BasisConv2d.from_conv(conv, basis_channels)
        best = best_error(conv, basis_channels)
        assert best * (1 - 1e-9) <= error(conv, layer) <= 1.01 * best
        # The tangents of the angles between the best column space and the first coordinates.
        left = torch.linalg.svd(kernel(conv))[0][:, :basis_channels]
        exact = left[basis_channels:] @ torch.linalg.inv(left[:basis_channels])
        largest = float(torch.linalg.matrix_norm(layer.coeff.detach(), 2))
        assert largest <= float(torch.linalg.matrix_norm(exact, 2)) * (1 + 1e-9)
        assert largest <= 16 * (1 + 1e-9)


def test_the_basis_is_the_least_squares_optimum_for_its_coefficients() -> None:
    matrix = torch.randn(12, 45, dtype=torch.float64)
    matrix[3] = 0.01 * matrix[3] + matrix[0]  # nearly dependent rows in front: clipping is needed
    matrix[:6] *= 0.1
    basis, coeff = leading_rows_factors(matrix, 6, 2.0**-52)
    design = torch.cat([torch.eye(6, dtype=torch.float64), coeff])
    torch.testing.assert_close(basis, torch.linalg.lstsq(design, matrix).solution)
    best = float(torch.linalg.svdvals(matrix)[6:].square().sum())
    result = float((matrix - kernel_matrix(basis, coeff, True)).square().sum())
    assert result <= 1.01 * best


def test_a_kernel_whose_first_filters_are_zero_keeps_finite_coefficients() -> None:
    """Rank 4 with nothing in the first four rows: only the limit of infinite coefficients fits."""
    conv = nn.Conv2d(5, 12, 3)
    conv.weight.data[:4] = 0
    conv.weight.data[8:] = conv.weight.data[4:8]
    layer = BasisConv2d.from_conv(conv, 4)
    assert bool(layer.coeff.isfinite().all())
    assert float(layer.coeff.detach().norm()) < 2 * torch.finfo(torch.float32).eps ** -0.5
    assert error(conv, layer) <= 1e-5 * float(kernel(conv).square().sum())


def test_a_zero_kernel_stays_zero_and_trainable() -> None:
    conv = nn.Conv2d(2, 6, 3)
    nn.init.zeros_(conv.weight)
    for init, include_basis in INITS[:2]:
        layer = BasisConv2d.from_conv(conv, 3, init, include_basis)
        assert error(conv, layer) == 0
        layer(torch.randn(1, 2, 4, 4)).square().sum().backward()
        first = layer.basis if include_basis else layer.coeff
        assert first.grad is not None
        assert float(first.grad.abs().max()) > 0


def test_select_keeps_the_filters_that_span_the_most() -> None:
    conv = conv_of_rank(12)
    big = [2, 7, 11]
    conv.weight.data[big] *= 50
    layer = BasisConv2d.from_conv(conv, 3, "select")
    assert not layer.include_basis
    assert torch.equal(layer.basis, conv.weight[big])
    assert torch.equal(layer.coeff[big], torch.eye(3, dtype=torch.float64))
    # The other rows are the least-squares optimum for this basis.
    solution = torch.linalg.lstsq(layer.basis.flatten(1).T, kernel(conv).T).solution.T
    torch.testing.assert_close(layer.coeff.detach(), solution, rtol=1e-9, atol=1e-9)


def test_select_pivots_on_what_is_left_over() -> None:
    """The second largest filter is a multiple of the largest, so it is not chosen."""
    conv = nn.Conv2d(1, 4, (1, 3), bias=False).double()
    rows = [[10.0, 0, 0], [9, 0.1, 0], [0, 1, 0], [5, 0, 2]]
    conv.weight.data = torch.tensor(rows, dtype=torch.float64).view(4, 1, 1, 3)
    layer = BasisConv2d.from_conv(conv, 2, "select")
    assert torch.equal(layer.basis, conv.weight[[0, 3]])


@pytest.mark.parametrize("include_basis", [True, False])
def test_initial_values_have_the_variance_of_conv2d(include_basis: bool) -> None:
    torch.manual_seed(0)
    layer = BasisConv2d(32, 64, 3, 24, bias=True, include_basis=include_basis)
    variance = nn.Conv2d(32, 64, 3).weight.var().item()
    full = layer.to_conv().weight
    for part in (full[:24], full[24:]):
        assert part.var().item() == pytest.approx(variance, rel=0.1)
    assert layer.bias is not None
    assert 0.8 * 288**-0.5 < float(layer.bias.detach().abs().max()) <= 288**-0.5

    def values(seed: int) -> Tensor:
        layer.reset_parameters(torch.Generator().manual_seed(seed))
        return torch.cat([p.detach().flatten() for p in layer.parameters()])

    first = values(1)
    torch.rand(3)
    assert torch.equal(first, values(1))
    assert not torch.equal(first, values(2))


@pytest.mark.parametrize("init", ["svd", "select"])
def test_what_a_convolution_is_survives(init: str) -> None:
    conv = nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), bias=True, dtype=torch.bfloat16).eval()
    conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    conv.weight.requires_grad_(False)
    layer = BasisConv2d.from_conv(conv, 3, init)
    back = layer.to_conv()
    for module in (layer, back):
        assert not module.training
        assert module.kernel_size == (3, 5)
        assert module.stride == (2, 1)
        assert module.padding == (1, 2)
        assert all(p.dtype == torch.bfloat16 for p in module.parameters())
        assert module.bias is not None
        assert torch.equal(module.bias, conv.bias)
        assert module.bias.data_ptr() != conv.bias.data_ptr()
        assert module.bias.requires_grad
    for kernels in (layer.basis, back.weight):
        assert kernels.is_contiguous(memory_format=torch.channels_last)
        assert not kernels.is_contiguous()
        assert not kernels.requires_grad
    assert not layer.coeff.requires_grad
    assert BasisConv2d.from_conv(nn.Conv2d(4, 8, 3, bias=False), 3, init).bias is None


def saved_and_loaded(layer: BasisConv2d) -> BasisConv2d:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    new = BasisConv2d(3, 8, 3, 5, padding=1, bias=True, include_basis=layer.include_basis)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


@pytest.mark.parametrize("include_basis", [True, False])
@pytest.mark.parametrize(
    "copied", [saved_and_loaded, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_compute_the_same(
    copied: Callable[[BasisConv2d], BasisConv2d], include_basis: bool
) -> None:
    layer = BasisConv2d(3, 8, 3, 5, padding=1, bias=True, include_basis=include_basis)
    new = copied(layer)
    assert list(new.state_dict()) == ["basis", "coeff", "bias"]
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), new(x))
    assert all(a is not b for a, b in zip(layer.parameters(), new.parameters(), strict=True))


@pytest.mark.parametrize("include_basis", [True, False])
def test_compiles_in_one_graph_and_trains(include_basis: bool) -> None:
    layer = BasisConv2d(3, 8, 3, 5, padding=1, bias=True, include_basis=include_basis)
    reference = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    for module in (compiled, reference):
        F.relu(module(x)).square().sum().backward()
    for a, b in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_repr_tells_sizes_and_the_saving() -> None:
    text = repr(BasisConv2d(64, 128, 3, 64, padding=1, bias=True))
    assert "64, 128, kernel_size=(3, 3), basis_channels=64, stride=(1, 1), padding=(1, 1)" in text
    assert "40,960 weights and MACs per pixel (44.4% fewer than 73,728)" in text
    layer = BasisConv2d(64, 128, 1, 100, include_basis=False)
    assert "include_basis=False, 19,200 weights and MACs per pixel (134.4% more" in repr(layer)
    assert sum(p.numel() for p in layer.parameters()) == 19_200


def weight_normed() -> nn.Conv2d:
    conv = nn.Conv2d(4, 8, 3)
    torch.nn.utils.parametrizations.weight_norm(conv)
    return conv


def not_finite() -> nn.Conv2d:
    conv = nn.Conv2d(4, 8, 3)
    conv.weight.data[1, 2, 0, 0] = torch.nan
    return conv


@pytest.mark.parametrize(
    ("build", "kind", "sentence"),
    [
        (lambda: nn.Linear(4, 8), TypeError, "A Linear is not a Conv2d"),
        (lambda: Conv2dReLU(4, 8, 3), TypeError, "A Conv2dReLU has a forward of its own"),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), ValueError, "groups=2"),
        (lambda: nn.Conv2d(4, 8, 3, padding_mode="circular"), ValueError, "'circular'"),
        (lambda: nn.Conv2d(4, 8, 2, padding="same"), ValueError, "more zeros on one side"),
        (lambda: nn.LazyConv2d(8, 3), ValueError, "is lazy"),
        (lambda: nn.Conv2d(4, 8, 3, device="meta"), ValueError, "on the meta device"),
        (lambda: nn.Conv2d(4, 8, 3, dtype=torch.complex64), ValueError, "complex64"),
        (weight_normed, ValueError, "computed from other parameters"),
        (not_finite, ValueError, "NaN or infinity"),
    ],
)
def test_convolutions_that_cannot_be_replaced(
    build: Callable[[], nn.Conv2d], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        BasisConv2d.from_conv(build(), 3)


def test_bad_arguments_of_from_conv() -> None:
    conv = nn.Conv2d(4, 8, 3)
    for basis_channels in (0, -1, 9):
        with pytest.raises(ValueError, match="takes 1 to 8"):
            BasisConv2d.from_conv(conv, basis_channels)
    with pytest.raises(ValueError, match="Unknown init 'random'"):
        BasisConv2d.from_conv(conv, 3, "random")
    with pytest.raises(ValueError, match="cannot hold"):
        BasisConv2d.from_conv(conv, 3, "select", include_basis=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"basis_channels": 0}, "basis_channels is 0"),
        ({"basis_channels": 9}, "takes 1 to 8"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size is"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": -1}, "padding is -1"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding": "same", "stride": 2}, "needs stride 1"),
        ({"padding": "same", "kernel_size": 4}, "more zeros on one side"),
        ({"dilation": 1.5}, "dilation is 1.5"),
    ],
)
def test_bad_sizes(arguments: dict[str, object], sentence: str) -> None:
    sizes = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "basis_channels": 3}
    with pytest.raises(ValueError, match=sentence):
        BasisConv2d(**(sizes | arguments))  # type: ignore[arg-type]
