"""What the criteria compute, against double backward through branches written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scaling_networks import Batches, batches, grow_once, small_cnn, small_deit
from torch import Tensor, nn
from torch.nn import functional as F
from training import record

from growkernels.growth import NeuronScaling
from growkernels.growth.neuron_scaling import Scores

Perturbation = Callable[[Tensor, Tensor], Tensor]  # (O_i, a.x) -> the new O_i


def curvature(
    model: nn.Module, layer: str, neuron: int, data: Batches, change: Perturbation, at: str = ""
) -> Tensor:
    """Hessian in a of the mean loss if the neuron's output is changed by change(O_i, a.x).

    The change must have no first derivative at a = 0, so that no other curvature enters. With
    ``at`` the change is made to the output of that module (the layer's activation) instead.
    """
    module = model.get_submodule(layer)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    like = module.weight[neuron].detach()

    def loss(a: Tensor) -> Tensor:
        kept: dict[str, Tensor] = {}

        def look(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight = a.view_as(like)[None]
            kept["preact"] = output
            if isinstance(module, nn.Conv2d):
                kept["ax"] = F.conv2d(
                    args[0], weight, None, module.stride, module.padding, module.dilation
                )
            else:
                kept["ax"] = args[0] @ weight.T

        def perturb(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            dim = 1 if isinstance(module, nn.Conv2d) else -1
            before = kept["preact"].select(dim, neuron) if at else output.select(dim, neuron)
            new = change(before, kept["ax"].select(dim, 0)).unsqueeze(dim)
            parts = [output.narrow(dim, 0, neuron), new]
            rest = output.shape[dim] - neuron - 1
            return torch.cat([*parts, output.narrow(dim, neuron + 1, rest)], dim)

        handles = [
            module.register_forward_hook(look),
            model.get_submodule(at or layer).register_forward_hook(perturb),
        ]
        try:
            return torch.stack([F.cross_entropy(model(x), y) for x, y in data]).mean()
        finally:
            for handle in handles:
                handle.remove()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, torch.zeros_like(like).flatten())
    assert isinstance(hessian, Tensor)
    return hessian


def branch(output: Tensor, ax: Tensor) -> Tensor:
    """GELU without its slope at 0: all that is left is its curvature."""
    return output + F.gelu(ax) - 0.5 * ax


def split(act: Callable[[Tensor], Tensor]) -> Perturbation:
    """Two half-weighted copies of the neuron whose weights part in opposite directions."""
    return lambda z, ax: 0.5 * act(z + ax) + 0.5 * act(z - ax)


def assert_eigenpair(scores: Scores, layer: str, neuron: int, s: Tensor) -> None:
    value = float(torch.linalg.eigvalsh(s)[0])
    scale = float(torch.linalg.matrix_norm(s, 2))
    assert scale > 0
    assert float(scores.values[layer][neuron]) == pytest.approx(value, abs=1e-4 * scale)
    v = scores.directions[layer][neuron].flatten()
    assert float(v.norm()) == pytest.approx(1)
    assert float((s @ v - value * v).norm()) < 1e-2 * scale


def weight_of(model: nn.Module, layer: str) -> Tensor:
    module = model.get_submodule(layer)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module.weight


def scaled(model: nn.Module, criterion: str, data: Batches, **options: Any) -> Scores:
    generator = torch.Generator().manual_seed(0)
    scaling = NeuronScaling(model, criterion, generator=generator, **options)
    record(scaling, data)
    scores = scaling.scores(tol=1e-5)
    scaling.close()
    return scores


def test_splitting_is_the_curvature_of_the_branch_that_would_be_added() -> None:
    model = small_deit()
    data = batches(model, 2)
    scores = scaled(model, "splitting", data)
    assert scores.batches == 2
    assert set(scores.values) == {
        f"blocks.{block}.{layer}"
        for block in (0, 1)
        for layer in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    for layer, neuron in (
        ("blocks.0.attn.q", 1),
        ("blocks.1.attn.v", 5),
        ("blocks.0.mlp.fc1", 7),
        ("blocks.1.mlp.fc2", 0),
    ):
        assert_eigenpair(scores, layer, neuron, curvature(model, layer, neuron, data, branch))


def test_new_neurons_are_scored_like_old_ones() -> None:
    model = small_deit()
    scaling = NeuronScaling(model, form="pair", layers=["blocks.1.mlp.*"])
    grow_once(scaling, 200)
    new = "blocks.1.mlp.fc1.branches.0.plus"
    assert new in scaling.layers
    assert new.replace("plus", "minus") in scaling.left_out
    scaling.close()
    data = batches(model, 1)
    scores = scaled(model, "splitting", data, layers=["blocks.1.mlp.fc1"])
    for layer in ("blocks.1.mlp.fc1", new):
        assert_eigenpair(scores, layer, 0, curvature(model, layer, 0, data, branch))


def test_s2d_is_the_curvature_of_splitting_the_neuron() -> None:
    model = small_deit()
    data = batches(model, 2)
    scores = scaled(model, "s2d", data)
    assert set(scores.values) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}
    for layer, neuron in (("blocks.0.mlp.fc1", 2), ("blocks.1.mlp.fc1", 7)):
        at = layer.replace("fc1", "act")
        s = curvature(model, layer, neuron, data, split(F.gelu), at)
        assert_eigenpair(scores, layer, neuron, s)


def test_convolutions_have_patches_for_rows() -> None:
    model = small_cnn()
    data = batches(model, 2)
    scores = scaled(model, "splitting", data, kinds=("linear", "conv2d"))
    assert set(scores.values) == {"conv1", "conv2"}
    for layer in scores.values:
        assert_eigenpair(scores, layer, 3, curvature(model, layer, 3, data, branch))
    scores = scaled(model, "s2d", data, kinds=("conv2d",), layers=["conv1"])
    s = curvature(model, "conv1", 1, data, split(F.gelu), "act1")
    assert_eigenpair(scores, "conv1", 1, s)


def test_relu_under_s2d_needs_a_surrogate() -> None:
    model = small_cnn()
    with pytest.raises(ValueError, match=r"'conv2' has a ReLU behind it.*pass relu_beta="):
        NeuronScaling(model, "s2d", kinds=("conv2d",))
    data = batches(model, 1)
    scores = scaled(model, "s2d", data, kinds=("conv2d",), relu_beta=3.0)
    # The surrogate changes act'' alone: S = sum of dL/drelu * softplus''(z) * patches.
    kept: dict[str, Tensor] = {}
    handle = model.conv2.register_forward_hook(lambda m, a, o: kept.update(x=a[0], z=o))  # type: ignore[union-attr]
    other = model.act2.register_forward_hook(lambda m, a, o: kept.update(out=o))  # type: ignore[union-attr]
    loss = F.cross_entropy(model(data[0][0]), data[0][1])
    (delta,) = torch.autograd.grad(loss, kept["out"])
    handle.remove()
    other.remove()
    patches = F.unfold(kept["x"], 3, dilation=2, padding=1, stride=2)
    slope = torch.sigmoid(3 * kept["z"])
    w = (delta * 3 * slope * (1 - slope)).flatten(2)
    s = torch.einsum("nm,ncm,ndm->cd", w[:, 2], patches, patches)
    assert_eigenpair(scores, "conv2", 2, s)


@pytest.mark.parametrize("build", [small_deit, small_cnn])
def test_the_gradient_sum_is_the_eigenvalue_of_the_authors_matrix(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    data = batches(model, 3)
    kinds = ("linear", "conv2d") if build is small_cnn else ("linear",)
    scores = scaled(model, "gradient_sum", data, kinds=kinds, rows=4)  # exact for any rows
    loss = torch.stack([F.cross_entropy(model(x), y) for x, y in data]).mean()
    for layer, values in scores.values.items():
        (gradient,) = torch.autograd.grad(loss, weight_of(model, layer), retain_graph=True)
        rows = gradient.flatten(1)
        torch.testing.assert_close(values, rows.sum(1).clamp(max=0))
        ones = torch.ones(rows.shape[1], 1, dtype=rows.dtype)
        # Its eigenvalues by its Schur form, which is known: general solvers differ on a matrix
        # whose other eigenvalues are all the same one, 0, and may not converge at all.
        q = torch.linalg.qr(ones, mode="complete").Q
        schur = q.T @ (ones @ rows[:1]) @ q
        assert float(schur[1:].abs().max()) <= 1e-12 * float(schur.abs().max())
        smallest = schur.diagonal().min()
        torch.testing.assert_close(values[0], smallest.clamp(max=0), atol=1e-8, rtol=1e-6)


def test_controls_need_no_batches() -> None:
    model = small_deit()
    magnitude = NeuronScaling(model, "magnitude").scores()
    norms = weight_of(model, "blocks.1.attn.k").detach().norm(dim=1)
    torch.testing.assert_close(magnitude.values["blocks.1.attn.k"], -norms)

    def random(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        scores = NeuronScaling(model, "random", generator=generator).scores()
        return torch.cat(list(scores.values.values()))

    assert torch.equal(random(1), random(1))
    assert not torch.equal(random(1), random(2))
    assert float(random(1).max()) < 0
    assert float(random(1).min()) >= -1


def test_a_sample_of_the_rows_is_an_unbiased_estimate() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(1))

    def matrices(rows: int, seed: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(seed)
        scaling = NeuronScaling(model, layers=["0"], rows=rows, generator=generator)
        record(scaling, [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])
        sample = scaling._followed.recorder.kept.layers["0"]
        scaling.close()
        s = torch.einsum("mi,md,me->ide", sample.grad, sample.x, sample.x)
        return s * sample.seen / len(sample.x), len(sample.x)

    exact, kept = matrices(30, 0)
    assert kept == 30
    estimates = []
    for seed in range(150):
        s, kept = matrices(12, seed)
        assert kept == 12
        estimates.append(s)
    mean, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 150**0.5
    assert bool((error > 0).all())
    assert bool(((mean - exact).abs() < 5 * error).all())


def test_sums_over_a_sample_are_scaled_up() -> None:
    """With rows that are all alike a sample tells everything."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    one = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    data = [(one.expand(20, 2), torch.ones(20, dtype=torch.long))] * 2
    scores = scaled(model, "splitting", data, rows=7)
    assert_eigenpair(scores, "0", 1, curvature(model, "0", 1, data, branch))
    convolutions = small_cnn()
    images, labels = batches(convolutions, 1, size=1)[0]
    data = [(images.expand(6, 3, 8, 8), labels.expand(6))] * 2
    scores = scaled(convolutions, "splitting", data, rows=130, kinds=("conv2d",))
    for layer in ("conv1", "conv2"):  # two images of 64 positions, and 7 of 12 of 9
        assert_eigenpair(scores, layer, 2, curvature(convolutions, layer, 2, data, branch))


def test_loss_scale_and_autocast() -> None:
    model = small_deit(torch.float32)
    data = batches(model, 2)
    plain = scaled(model, "splitting", data)
    scaling = NeuronScaling(model, generator=torch.Generator().manual_seed(0))
    for x, y in data:
        with scaling.recording(loss_scale=64.0):
            (64 * F.cross_entropy(model(x), y)).backward()
    for layer, values in scaling.scores(tol=1e-5).values.items():
        torch.testing.assert_close(values, plain.values[layer], rtol=1e-3, atol=1e-6)
    scaling.reset()
    for x, y in data:
        with scaling.recording(), torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(x), y).backward()
    for layer, values in scaling.scores().values.items():
        largest = float(plain.values[layer].abs().max())
        torch.testing.assert_close(values, plain.values[layer], rtol=0.1, atol=0.05 * largest)


@pytest.mark.parametrize("criterion", ["splitting", "s2d", "gradient_sum"])
@pytest.mark.parametrize("layer", [nn.Linear(8, 5), nn.Conv2d(3, 5, 3)])
def test_an_open_autocast_does_not_round_the_scores(
    criterion: str, layer: nn.Linear | nn.Conv2d
) -> None:
    model = nn.Sequential(layer, nn.GELU())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((6, *((8,) if layer.weight.dim() == 2 else (3, 8, 8))), generator=generator)
    found = []
    for autocast in (False, True):
        generator = torch.Generator().manual_seed(0)
        scaling = NeuronScaling(
            model, criterion, kinds=("linear", "conv2d"), layers=["0"], generator=generator
        )
        # A gradient that autocast itself does not round.
        y = model(x) if criterion == "s2d" else layer(x)
        loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with scaling.recording():
                loss.backward()
            found.append(scaling.scores().values["0"])
        scaling.close()
    assert bool((found[0] < 0).any())
    assert torch.equal(*found)


def test_images_come_alone_in_batches_of_any_length_and_of_one_size() -> None:
    model = small_cnn()[:3]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    options: dict[str, Any] = {"kinds": ("conv2d",), "layers": ["conv1"]}
    for criterion in ("gradient_sum", "splitting", "s2d"):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        one, many = (
            NeuronScaling(model, criterion, generator=generator, **options)
            for generator in generators
        )
        with many.recording():
            (model(x).square().sum() + model(x[:0]).sum()).backward()
        with one.recording():
            torch.stack([model(image).square().sum() for image in x]).sum().backward()
        expected, values = many.scores().values["conv1"], one.scores().values["conv1"]
        assert bool((expected < 0).any())
        torch.testing.assert_close(values, expected)
    message = "'conv1' ran on inputs of shapes .*; record at one image size"
    with pytest.raises(RuntimeError, match=message), one.recording():
        (model(x).sum() + model(x[..., 1:7]).sum()).backward()
    with pytest.raises(RuntimeError, match=message), one.recording():
        model(x[..., 1:7]).sum().backward()
    one.reset()
    with one.recording():
        model(x[..., 1:7]).sum().backward()


class TwoHeads(nn.Module):
    """One layer of two is used by the loss, and an input can be changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.spoil = False

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        h = self.used(x)
        if self.spoil:
            x.detach().add_(1)
        out: Tensor = self.out(h)
        return out


def test_recordings_that_cannot_be_used() -> None:
    model = TwoHeads()
    x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    scaling = NeuronScaling(model)
    with pytest.raises(RuntimeError, match="No batches are recorded"):
        scaling.scores()
    with (
        pytest.raises(RuntimeError, match="No gradient reached layer 'unused'"),
        scaling.recording(),
    ):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="No batches are recorded"):
        scaling.scores()
    scaling.close()

    scaling = NeuronScaling(model, layers=["used"])
    model.used.weight.requires_grad_(False)  # else autograd itself notices the change
    model.spoil = True
    changed = pytest.raises(RuntimeError, match="input of layer 'used' was changed in place")
    with changed, scaling.recording():
        F.cross_entropy(model(x), y).backward()
    model.spoil = False
    with scaling.recording():
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(RuntimeError, match="already open"), scaling.recording():
            pass
    assert scaling.scores().batches == 1
    with pytest.raises(ValueError, match="loss_scale is 0"), scaling.recording(loss_scale=0):
        pass
    with torch.no_grad():
        model.out.weight.fill_(float("nan"))
    with scaling.recording():
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="'used' are NaN"):
        scaling.scores()
