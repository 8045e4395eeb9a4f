"""Merits against autograd on networks with the identity layers really in them."""

from __future__ import annotations

import math

import pytest
import torch
from small_networks import (
    VirtualResidual,
    batches,
    cnn,
    extended,
    mean_gradients,
    mlp,
    resnet,
    virtual_conv,
    virtual_linear,
)
from torch import Tensor, nn
from torch.nn import functional as F
from training import Batches, record

from growkernels.growth import LayerInsertion, Merits


def merits_of(model: nn.Module, data: Batches, **options: object) -> tuple[LayerInsertion, Merits]:
    inserter = LayerInsertion(model, **options)  # type: ignore[arg-type]
    record(inserter, data)
    return inserter, inserter.merits()


def frobenius(gradients: list[Tensor]) -> Tensor:
    return torch.stack([g.square().sum() for g in gradients])


def flat(model: nn.Sequential) -> nn.Sequential:
    """The cnn without its nesting, sharing parameters."""
    return nn.Sequential(*[m for m in model.modules() if not isinstance(m, nn.Sequential)])


def oracle(sort: str, data: Batches) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The model, and the squared norms of the virtual and of the existing weights' gradients."""
    if sort == "mlp":
        model, virtual = mlp(), {1: virtual_linear(5), 3: virtual_linear(7)}
        new = [layer[0].weight for layer in virtual.values()]
        wanted: type[nn.Module] = nn.Linear
    elif sort == "resnet":
        model = resnet()
        residual = {i: VirtualResidual(3, "tanh", 0.8) for i in (1, 2, 3)}
        virtual, wanted = residual, nn.Linear  # type: ignore[assignment]
        new = [layer.weight for layer in residual.values()]
    else:
        model, virtual = cnn(), {1: virtual_conv(4), 5: virtual_conv(6)}
        new = [layer[0].weight for layer in virtual.values()]
        wanted = nn.Conv2d
    network = extended(flat(model) if sort == "cnn" else model, virtual)
    base_layers = [
        m for m in (flat(model) if sort == "cnn" else model).modules() if isinstance(m, wanted)
    ]
    merits = frobenius(mean_gradients(network, new, data))
    base = frobenius(mean_gradients(model, [m.weight for m in base_layers], data))  # type: ignore[misc]
    return model, merits, base


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sort", ["mlp", "resnet", "cnn"])
def test_merits_and_base_are_those_of_the_extended_network(sort: str, count: int) -> None:
    data = batches(cnn() if sort == "cnn" else mlp(), count, 20)
    model, expected, base = oracle(sort, data)
    inserter, merits = merits_of(model, data)
    torch.testing.assert_close(merits.values, expected, rtol=1e-10, atol=0)
    assert merits.base == pytest.approx(float(base.mean()), rel=1e-10)
    assert merits.batches == count
    assert inserter.select(merits) == merits.names[int(expected.argmax())]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "sigmoid"])
def test_residual_activations(activation: str) -> None:
    model = resnet(activation=activation)
    data = batches(model, 2, 11)
    virtual = {i: VirtualResidual(3, activation, 0.5) for i in (1, 2, 3)}
    new = [layer.weight for layer in virtual.values()]
    expected = frobenius(mean_gradients(extended(model, dict(virtual)), new, data))
    _, merits = merits_of(model, data, scale=0.5)
    torch.testing.assert_close(merits.values, expected, rtol=1e-10, atol=0)


def test_scaled_norm_divides_by_the_number_of_entries() -> None:
    data = batches(mlp(), 2, 20)
    _, plain = merits_of(mlp(), data)
    _, scaled = merits_of(mlp(), data, norm="frobenius_scaled")
    torch.testing.assert_close(scaled.values, plain.values / torch.tensor([25.0, 49.0]).double())


def test_operator_norm_of_matrices_and_convolutions() -> None:
    data = batches(mlp(), 2, 20)
    model, virtual = mlp(), {1: virtual_linear(5), 3: virtual_linear(7)}
    gradients = mean_gradients(
        extended(model, virtual), [layer[0].weight for layer in virtual.values()], data
    )
    _, merits = merits_of(model, data, norm="operator")
    expected = torch.stack([torch.linalg.matrix_norm(g, 2) ** 2 for g in gradients])
    torch.testing.assert_close(merits.values, expected)

    images = batches(cnn(), 2, 4)
    _, merits = merits_of(cnn(), images, norm="operator")
    _, frobenius_merits = merits_of(cnn(), images)
    # ||G||_F <= operator norm of the circular convolution <= 3 ||G||_F for 3x3 taps.
    assert bool((merits.values <= 9 * frobenius_merits.values).all())
    assert bool((merits.values > 0.1 * frobenius_merits.values).all())
    assert math.isfinite(merits.base)


def test_signal_to_noise_is_the_squared_mean_over_its_estimated_variance() -> None:
    model = mlp()
    data = batches(model, 6, 9)
    virtual = {1: virtual_linear(5), 3: virtual_linear(7)}
    network = extended(model, virtual)
    expected = []
    for layer in virtual.values():
        each = torch.stack(
            [mean_gradients(network, [layer[0].weight], [batch])[0].flatten() for batch in data]
        )
        expected.append(each.mean(0).square().sum() / (each.var(0).sum() / len(data)))
    _, merits = merits_of(model, data)
    torch.testing.assert_close(merits.snr, torch.stack(expected))
    assert merits_of(model, data[:1])[1].snr is None


def test_forward_before_the_recording_counts_too_and_other_passes_do_not() -> None:
    model = mlp()
    data = batches(model, 2, 20)
    _, expected = merits_of(mlp(), data)
    inserter = LayerInsertion(model)
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            model(x)
        F.cross_entropy(model(x * 2), y).backward()
        with inserter.recording():
            loss.backward()
    torch.testing.assert_close(inserter.merits().values, expected.values)


def test_gradients_of_the_user_are_what_they_are_without_recording() -> None:
    plain, watched = mlp(), mlp()
    for x, y in batches(plain, 2, 20):
        F.cross_entropy(plain(x), y).backward()
    inserter = LayerInsertion(watched)
    for x, y in batches(plain, 2, 20):
        with inserter.recording():
            F.cross_entropy(watched(x), y).backward()
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_the_base_merit_does_not_depend_on_what_the_user_does_with_gradients() -> None:
    model = mlp()
    data = batches(model, 3, 20)
    _, expected = merits_of(mlp(), data)
    inserter = LayerInsertion(model)
    for x, y in data:
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(100)
        model.zero_grad()
    assert inserter.merits().base == pytest.approx(expected.base)


def test_tokens_are_flattened() -> None:
    model = mlp()
    x = torch.randn(4, 6, 2, dtype=torch.float64)
    inserter = LayerInsertion(model)
    with inserter.recording():
        model(x).square().mean().backward()
    tokens = inserter.merits().values
    inserter.reset()
    with inserter.recording():
        model(x.flatten(0, 1)).square().mean().backward()
    torch.testing.assert_close(inserter.merits().values, tokens)


def test_a_scaled_loss_gives_the_merits_of_the_unscaled_one() -> None:
    model = mlp()
    data = batches(model, 3, 20)
    _, expected = merits_of(mlp(), data)
    inserter = LayerInsertion(model)
    for scale, (x, y) in zip([1024.0, 1024.0, 512.0], data, strict=True):
        with inserter.recording(loss_scale=scale):
            (F.cross_entropy(model(x), y) * scale).backward()
    merits = inserter.merits()
    torch.testing.assert_close(merits.values, expected.values)
    torch.testing.assert_close(merits.snr, expected.snr)
    assert merits.base == pytest.approx(expected.base)


def test_autocast_merits_are_close_and_in_full_precision() -> None:
    model = mlp(dtype=torch.float32)
    data = batches(model, 1, 40)
    _, expected = merits_of(mlp(dtype=torch.float32), data)
    inserter = LayerInsertion(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(data[0][0]), data[0][1])
    with inserter.recording():
        loss.backward()
    merits = inserter.merits()
    torch.testing.assert_close(merits.values, expected.values, rtol=0.05, atol=1e-6)


def test_positions_of_different_dtypes_are_promoted() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Sequential(nn.Linear(2, 4), nn.ReLU()).bfloat16()
            self.high = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.high(self.low(x.bfloat16()).float())
            return out

    torch.manual_seed(0)
    model = Mixed()
    inserter = LayerInsertion(model)
    h: list[Tensor] = []
    model.low.register_forward_hook(lambda m, a, out: h.append(out) or out.retain_grad())
    with inserter.recording():
        model(torch.randn(16, 2)).square().sum().backward()
    merits = inserter.merits()
    assert h[0].grad is not None
    g = h[0].grad.double() * (h[0] > 0)
    torch.testing.assert_close(
        merits.values[0], (g.T @ h[0].double()).square().sum(), rtol=1e-5, atol=0
    )
    assert merits.names == ("low.1", "high.1")


def test_mixed_kinds_in_one_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    x, y = batches(model, 1, 8)[0]
    virtual = {1: virtual_conv(4), 5: virtual_linear(5)}
    expected = frobenius(
        mean_gradients(extended(model, virtual), [v[0].weight for v in virtual.values()], [(x, y)])
    )
    inserter, merits = merits_of(model, [(x, y)])
    torch.testing.assert_close(merits.values, expected)
    assert [p.kind for p in inserter.positions] == ["conv2d_relu", "linear_relu"]
    _, merits = merits_of(model, [(x, y)], kinds=("conv2d_relu",))
    assert merits.names == ("1",)
    assert merits.note is not None
    assert "one candidate position only" in merits.note
