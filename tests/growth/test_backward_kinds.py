"""A recording takes one ordinary backward pass; what else makes hooks fire is refused by name."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from small_networks import mlp
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from growkernels.growth import LayerInsertion, NeuronScaling

Driver = LayerInsertion | NeuronScaling
DRIVERS: list[Callable[[nn.Module], Driver]] = [
    lambda model: LayerInsertion(model),
    lambda model: NeuronScaling(model),
    lambda model: NeuronScaling(model, "gradient_sum"),
    lambda model: NeuronScaling(model, "s2d", relu_beta=3.0),
]
every_driver = pytest.mark.parametrize("build", DRIVERS)


def samples(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (12,), generator=generator)


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return slope.square().sum()


def numbers(driver: Driver) -> list[Tensor]:
    if isinstance(driver, LayerInsertion):
        merits = driver.merits()
        return [merits.values, torch.tensor(merits.base).double()]
    return list(driver.scores().values.values())


def expect_same(driver: Driver, other: Driver) -> None:
    for a, b in zip(numbers(driver), numbers(other), strict=True):
        torch.testing.assert_close(a, b)


def refused(driver: Driver, sentence: str, passes: Callable[[], None]) -> None:
    """Refused, and what was recorded before stays."""
    x, y = samples()
    model = driver.model
    with driver.recording():
        F.cross_entropy(model(x), y).backward()
    before = numbers(driver)
    with pytest.raises(RuntimeError, match=sentence), driver.recording():
        passes()
    for a, b in zip(numbers(driver), before, strict=True):
        torch.testing.assert_close(a, b)


@every_driver
@pytest.mark.parametrize("same_forward", [True, False])
@pytest.mark.parametrize("inner_inside", [True, False])
def test_a_gradient_penalty(
    build: Callable[[nn.Module], Driver], same_forward: bool, inner_inside: bool
) -> None:
    model = mlp()
    driver = build(model)
    x, y = samples()

    def loss() -> Tensor:
        if not same_forward:
            return F.cross_entropy(model(x), y) + penalty(model, x)
        given = x.clone().requires_grad_()
        value = F.cross_entropy(model(given), y)
        (slope,) = torch.autograd.grad(value, given, create_graph=True)
        return value + slope.square().sum()

    if inner_inside:
        refused(driver, "create_graph=True", lambda: loss().backward())
    else:
        outside = loss()
        refused(driver, "create_graph=True", lambda: outside.backward())


@every_driver
def test_an_inner_step_on_the_weights(build: Callable[[nn.Module], Driver]) -> None:
    """Second-order meta-gradients: the loss of functional_call at updated weights."""
    model = mlp()
    x, y = samples()

    def passes() -> None:
        weights = dict(model.named_parameters())
        inner = F.cross_entropy(model(x), y)
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        updated = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), slopes, strict=True)}
        F.cross_entropy(functional_call(model, updated, (x,)), y).backward()

    refused(build(model), "create_graph=True", passes)


@every_driver
def test_a_penalty_in_front_of_which_nothing_changes(build: Callable[[nn.Module], Driver]) -> None:
    """What the inner pass did not go through has an ordinary gradient of the whole loss."""
    model = mlp()
    head = nn.Linear(7, 1).double()
    x, _ = samples()
    driver, plain = build(model[:4]), build(copy.deepcopy(model[:4]))
    h = 1.0 * model[:4](x)  # behind the last position, which is the model's output
    (slope,) = torch.autograd.grad(head(h).tanh().sum(), h, create_graph=True)
    with driver.recording():
        slope.square().sum().backward(retain_graph=True)
    dh = torch.autograd.grad(slope.square().sum(), h)[0]
    with plain.recording():
        plain.model(x).backward(dh)
    expect_same(driver, plain)


@every_driver
@pytest.mark.parametrize("which", ["retained", "two batches", "two losses", "adversarial"])
def test_several_backward_passes(build: Callable[[nn.Module], Driver], which: str) -> None:
    model = mlp()
    x, y = samples()

    def passes() -> None:
        if which == "retained":
            loss = F.cross_entropy(model(x), y)
            loss.backward(retain_graph=True)
            loss.backward()
        elif which == "two batches":
            for _ in range(2):
                F.cross_entropy(model(x), y).backward()
        elif which == "two losses":
            losses = [F.cross_entropy(model(x), y), model(x).square().sum()]
            for loss in losses:
                loss.backward()
        else:
            given = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(given), y), given)
            F.cross_entropy(model(x + 0.1 * slope.sign()), y).backward()

    refused(build(model), "more than one gradient in one recording, from several", passes)


@every_driver
def test_other_passes_outside_of_the_recording(build: Callable[[nn.Module], Driver]) -> None:
    """A forward pass from before the recording, differentiated before it already."""
    model, other = mlp(), mlp()
    x, y = samples()
    driver, plain = build(model), build(other)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    with driver.recording():
        loss.backward()
    with plain.recording():
        F.cross_entropy(other(x), y).backward()
    expect_same(driver, plain)


@every_driver
def test_losses_that_are_added_up_are_one_pass(build: Callable[[nn.Module], Driver]) -> None:
    model, other = mlp(), mlp()
    x, y = samples()
    driver, plain = build(model), build(other)
    with driver.recording():
        out = model(x)
        torch.autograd.backward([F.cross_entropy(out, y), out.square().sum()])
    with plain.recording():
        out = other(x)
        (F.cross_entropy(out, y) + out.square().sum()).backward()
    expect_same(driver, plain)


class Checkpointed(nn.Module):
    def __init__(self, parts: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.parts = parts
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for part in (self.parts[:2], self.parts[2:]):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@every_driver
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_runs_forwards_again(
    build: Callable[[nn.Module], Driver], reentrant: bool
) -> None:
    parts = mlp()
    model = Checkpointed(parts, reentrant)
    x, y = samples()
    driver, plain = build(parts), build(mlp())
    with driver.recording():
        F.cross_entropy(model(x.clone()), y).backward()
    with plain.recording():
        F.cross_entropy(plain.model(x), y).backward()
    expect_same(driver, plain)

    def twice() -> None:
        for _ in range(2):
            F.cross_entropy(model(x.clone()), y).backward()

    refused(driver, "from several backward passes", twice)


@pytest.mark.parametrize("criterion", ["splitting", "gradient_sum"])
def test_a_layer_that_runs_twice_in_one_pass_is_one_with_more_rows(criterion: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, _ = samples()
    twice = NeuronScaling(model, criterion, layers=["0"])
    with twice.recording():
        model(model[:2](x)).square().sum().backward()
    weight = model[0].weight.grad
    assert isinstance(weight, Tensor)
    if criterion == "gradient_sum":
        torch.testing.assert_close(twice.scores().values["0"], weight.sum(1).clamp(max=0))
    else:
        assert twice._followed.recorder.kept.layers["0"].seen == 2 * len(x)


def test_the_gradient_sum_holds_a_penalty_on_the_weights() -> None:
    model = mlp()
    x, y = samples()
    scaling = NeuronScaling(model, "gradient_sum")
    with scaling.recording():
        decay = sum(p.square().sum() for p in model.parameters())
        (F.cross_entropy(model(x), y) + 0.3 * decay).backward()
    for name, values in scaling.scores().values.items():
        gradient = model.get_submodule(name).weight.grad
        assert isinstance(gradient, Tensor)
        torch.testing.assert_close(values, gradient.sum(1).clamp(max=0))


@every_driver
def test_forward_mode(build: Callable[[nn.Module], Driver]) -> None:
    model = mlp()
    x, y = samples()

    def passes() -> None:
        with dual_level():
            out, tangent = unpack_dual(model(make_dual(x, torch.ones_like(x))))
            (F.cross_entropy(out, y) + tangent.square().sum()).backward()

    refused(build(model), "forward-mode", passes)


@every_driver
@pytest.mark.parametrize("transform", ["grad", "jvp", "batched"])
def test_transforms(build: Callable[[nn.Module], Driver], transform: str) -> None:
    model = mlp()
    x, y = samples()
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, given, (x,)), y)

    def passes() -> None:
        if transform == "grad":
            grad(loss)(weights)
        elif transform == "jvp":
            jvp(loss, (weights,), (weights,))[1].backward()
        else:
            out = model(x)
            vectors = torch.stack([torch.ones_like(out), torch.zeros_like(out)])
            torch.autograd.grad(out, list(model.parameters()), vectors, is_grads_batched=True)

    if transform == "jvp":  # no gradient of a watched tensor is left there
        driver = build(model)
        with pytest.raises(RuntimeError), driver.recording():
            passes()
        return
    refused(build(model), "torch.func|create_graph|transform", passes)


def test_transforms_outside_of_recordings_work_on_watched_models() -> None:
    model = mlp()
    x, y = samples()
    drivers = [build(model) for build in DRIVERS]
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, given, (x[None],)), y[None])

    of_samples = vmap(grad(loss), (None, 0, 0))(weights, x, y)
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(of_samples[name].mean(0), parameter.grad)
    for driver in drivers:
        with driver.recording():
            F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("build", DRIVERS)
def test_nothing_outlives_the_backward_pass(build: Callable[[nn.Module], Driver]) -> None:
    """Activations are let go of with the graph, though the loss is held."""
    model = mlp()
    held: list[weakref.ref[torch.UntypedStorage]] = []
    model[1].register_forward_hook(
        lambda m, a, out: held.append(weakref.ref(out.untyped_storage()))
    )
    driver = build(model)
    x, y = samples()
    loss = F.cross_entropy(model(x), y)
    with driver.recording():
        loss.backward()
    assert loss.isfinite()
    assert held[0]() is None
