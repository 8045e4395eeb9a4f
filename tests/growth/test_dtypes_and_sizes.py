"""Every dtype and size is grown, or refused in a sentence before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import BasisSearch, LayerInsertion, NeuronScaling
from growkernels.nn import LinearReLU, ResidualBlock, convert

CRITERIA = ("splitting", "s2d", "gradient_sum", "magnitude", "random")


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).to(dtype)


def cnn(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    ).to(dtype)


def loss(model: nn.Module, rows: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(model(x).float(), torch.arange(rows) % 3, reduction="sum")


REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", REAL)
def test_insertions_in_every_real_dtype(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    inserter = LayerInsertion(model)
    with inserter.recording():
        loss(model, dtype=dtype).backward()
    x = torch.randn(5, 4, dtype=dtype)
    before = model(x)
    new = inserter.insert(str(inserter.select(inserter.merits())), sample=x)
    assert new.weight.dtype == dtype
    assert torch.equal(model(x), before)
    inserter = LayerInsertion(nn.Sequential(nn.Linear(4, 4), ResidualBlock(4)).to(dtype))
    model = inserter.model
    with inserter.recording():
        model(x).float().sum().backward()
    inserter.insert("1")


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_neurons_in_every_real_dtype(dtype: torch.dtype, criterion: str) -> None:
    model = mlp(dtype)
    scaling = NeuronScaling(model, criterion, layers=["0"], form="gated", widen=("fc1",))
    with scaling.recording():
        loss(model, dtype=dtype).backward()
    chosen = scaling.select(scaling.scores(), budget=100, min_eligible=1)
    before = model(torch.ones(2, 4, dtype=dtype)).float()
    if chosen:
        scaling.grow(chosen)
        assert {p.dtype for p in model.parameters()} == {dtype}
        after = model(torch.ones(2, 4, dtype=dtype)).float()
        torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)
        loss(model, dtype=dtype).backward()


@pytest.mark.parametrize("dtype", REAL)
def test_conversions_in_every_real_dtype(dtype: torch.dtype) -> None:
    model = cnn(dtype)
    convert(model, {"0": 2, "2": 0.5})
    model(torch.ones(2, 3, 6, 6, dtype=dtype)).float().sum().backward()
    convert(model, {"0": 1.0})
    assert model[0].weight.dtype == dtype
    BasisSearch(cnn(dtype), (0.5,))


class Complex(nn.Module):
    """A network with a complex part, whose output is real again."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(4, 4, dtype=torch.complex64)
        self.back = nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x.to(torch.complex64)).abs()
        out: Tensor = self.head(self.act(self.back(h)))
        return out


def test_complex_layers() -> None:
    model = Complex()
    scaling = NeuronScaling(model)
    assert scaling.layers == ("back",)
    assert "complex64" in scaling.left_out["front"]
    with pytest.raises(ValueError, match="real numbers alone"):
        NeuronScaling(model, layers=["front"])
    inserter = LayerInsertion(model, ["act"])
    with inserter.recording():
        loss(model).backward()
    gradients = [model.back.weight.grad, model.head.weight.grad]
    expected = torch.stack([g.square().sum() for g in gradients]).mean()
    assert inserter.merits().base == pytest.approx(float(expected), rel=1e-5)
    assert inserter.insert("act").weight.dtype == torch.float32
    named = LayerInsertion(Complex(), {"front": "residual"})
    with (
        pytest.raises(RuntimeError, match=r"returns torch\.complex64; layers are inserted on real"),
        named.recording(),
    ):
        loss(named.model).backward()
    blocks = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), ResidualBlock(4)).to(
        torch.complex64
    )
    inserter = LayerInsertion(blocks)
    with pytest.raises(RuntimeError, match="layers are inserted on real"):  # noqa: SIM117
        with inserter.recording():
            blocks(torch.ones(2, 4, dtype=torch.complex64)).abs().sum().backward()


def test_integer_and_quantized_layers_are_left_alone() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)
    scaling = NeuronScaling(model)
    assert "int8" in scaling.left_out["0"]
    quantized = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, torch.qint8)
    positions = LayerInsertion(nn.Sequential(*quantized, nn.Linear(3, 3), nn.ReLU())).positions
    assert [position.name for position in positions] == ["6"]
    with pytest.raises(ValueError, match="no layer to grow"):
        NeuronScaling(quantized)


def test_lazy_layers_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    assert "is lazy" in NeuronScaling(model).left_out["0"]
    LayerInsertion(nn.Sequential(nn.LazyLinear(4), nn.ReLU()))


def test_an_empty_last_batch() -> None:
    model = mlp()
    inserter = LayerInsertion(model)
    for rows in (6, 0):
        with inserter.recording():
            loss(model, rows).backward()
    assert inserter.merits().batches == 2
    new = inserter.insert("3")
    assert isinstance(new, LinearReLU)


def test_empty_batches_alone() -> None:
    model = mlp()
    before = list(model.modules())
    inserter = LayerInsertion(model)
    with inserter.recording():
        loss(model, 0).backward()
    assert float(inserter.merits().values[0]) == 0
    with pytest.raises(
        RuntimeError, match=r"are empty \(shape \[0, 5\]\).*record a batch with sam"
    ):
        inserter.insert("3")
    assert list(model.modules()) == before


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("batches", [(6, 0), (0, 6), (0,)])
def test_neurons_and_empty_batches(criterion: str, batches: tuple[int, ...]) -> None:
    scores = []
    for sizes in (batches, [size for size in batches if size]):
        model = mlp()
        generator = torch.Generator().manual_seed(0)
        scaling = NeuronScaling(model, criterion, layers=["0"], generator=generator)
        for rows in sizes:
            with scaling.recording():
                loss(model, rows).backward()
        if not sizes:
            continue
        scores.append(scaling.scores().values["0"] * max(1, len(sizes)))
    assert bool(scores[0].isfinite().all())
    if len(scores) == 2 and criterion not in ("magnitude", "random"):
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-6)


def test_taylor_and_an_empty_batch() -> None:
    model = nn.Sequential(*cnn(), nn.Linear(8 * 4 * 4, 3))
    data = [(torch.randn(rows, 3, 6, 6), torch.arange(rows) % 3) for rows in (4, 0)]
    search = BasisSearch(model, (0.25,))
    with pytest.raises(ValueError, match="batch"):
        search.sensitivities("taylor", batches=data)
    assert search.sensitivities("taylor", batches=data[:1]).costs


def test_layers_without_width() -> None:
    model = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 3))
    inserter = LayerInsertion(model)
    with inserter.recording():
        loss(model).backward()
    before = list(model.modules())
    with pytest.raises((ValueError, RuntimeError), match=r"empty|width"):
        inserter.insert("1")
    assert list(model.modules()) == before
    inserter.insert("3")
    scaling = NeuronScaling(model, "magnitude", kinds=("linear",), layers=None)
    assert "no weights" in scaling.left_out["0"]
    assert "no weights" in scaling.left_out["2"]


def test_what_has_no_axes() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), Single())
    inserter = LayerInsertion(model, {"2": "residual"})
    with pytest.raises(RuntimeError, match="a single number without axes"):  # noqa: SIM117
        with inserter.recording():
            model(torch.ones(2, 4)).backward()


def test_single_samples_without_a_batch() -> None:
    model = mlp()
    inserter, scaling = LayerInsertion(model), NeuronScaling(model, layers=["0"])
    with inserter.recording(), scaling.recording():
        model(torch.ones(4)).sum().backward()
    one, rows = inserter.merits(), scaling.scores()
    inserter.reset()
    scaling.reset()
    with inserter.recording(), scaling.recording():
        model(torch.ones(1, 4)).sum().backward()
    torch.testing.assert_close(one.values, inserter.merits().values)
    torch.testing.assert_close(rows.values["0"], scaling.scores().values["0"], rtol=1e-4, atol=1e-6)
    inserter.insert("3")
    images = cnn()
    inserter = LayerInsertion(images[:2])
    with pytest.raises(RuntimeError, match=r"batches of images \[N, C, H, W\]"):  # noqa: SIM117
        with inserter.recording():
            images[:2](torch.randn(3, 6, 6)).sum().backward()
    assert copy.deepcopy(images)
