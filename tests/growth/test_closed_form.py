"""GradMax and TINY against their authors' formulas, from explicit matrices in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scaling_networks import assert_repeats
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import NeuronScaling, insertions

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}
SLOPES = {"tanh": 1.0, "gelu": 0.5, "relu": 1.0, "sigmoid": 0.25, "none": 1.0}


def network(activation: str = "tanh") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), ACTIVATIONS[activation](), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(20, 5, generator=generator).double(), torch.arange(20) % 3)
        for _ in range(count)
    ]


def loss_of(model: nn.Module) -> Tensor:
    losses = [F.cross_entropy(model(x), y) for x, y in batches()]
    return torch.stack(losses).mean()


def recorded(model: nn.Module, criterion: str, **options: Any) -> NeuronScaling:
    scaling = NeuronScaling(model, criterion, widen=("fc1",), depth=False, **options)
    for x, y in batches():
        with scaling.recording():
            F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    return scaling


def explicit(model: nn.Sequential) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, h and dL/dz of every batch, for the first layer and the second, by autograd alone."""
    found = []
    for x, y in batches():
        h = model[1](model[0](x))
        z = model[2](h)
        (g,) = torch.autograd.grad(F.cross_entropy(model[4](model[3](z)), y), z)
        found.append((x, h.detach(), g))
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradmax(activation: str) -> None:
    model = network(activation)
    scaling = recorded(model, "gradmax", layers=["0"])
    scores = scaling.scores()
    n = torch.stack([g.T @ x for x, _, g in explicit(model)]).mean(0)
    left, singular, _ = torch.linalg.svd(n)
    c = model[2].weight.detach().norm(dim=0).mean()
    slope = SLOPES[activation]
    torch.testing.assert_close(scores.values["0"], -((slope * c * singular) ** 2))
    before = model(batches()[0][0]).detach()
    chosen = scaling.select(scores, 3 * (5 + 1 + 4), 1)
    assert len(chosen.neurons["0"]) == 3
    scaling.grow(chosen, init="gradmax", sample=batches()[0][0])
    torch.testing.assert_close(model(batches()[0][0]).detach(), before, rtol=1e-12, atol=1e-13)
    outgoing = model[2].weight.detach()[:, 7:]
    torch.testing.assert_close((left[:, :3].T @ outgoing).abs(), c * torch.eye(3).double())
    loss_of(model).backward()
    gradient = model[0].weight.grad[7:]
    torch.testing.assert_close(gradient.norm(dim=1), slope * c * singular[:3])
    # No other outgoing weights of these norms give new incoming weights a larger gradient.
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        other = F.normalize(torch.randn(4, 3, generator=generator).double(), dim=0)
        other = torch.linalg.qr(other).Q * c
        assert (slope * other.T @ n).square().sum() <= gradient.square().sum() * (1 + 1e-12)


def formulas_of_tiny(model: nn.Sequential) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values, incoming [K, d + 1] and outgoing [D, K] weights, row by row."""
    data = explicit(model)
    x = torch.cat([torch.cat([x, torch.ones(len(x), 1).double()], 1) for x, _, _ in data])
    h = torch.cat([torch.cat([h, torch.ones(len(h), 1).double()], 1) for _, h, _ in data])
    # The loss is a mean over the rows of a batch: one row's own gradient is as many times as large.
    wished = -torch.cat([len(g) * g for _, _, g in data])
    best = torch.linalg.lstsq(h, wished, driver="gelsd").solution
    rest = wished - h @ best
    s, n = x.T @ x / len(x), x.T @ rest / len(x)
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    u, singular, vh = torch.linalg.svd(root @ n, full_matrices=False)
    return singular, (root @ u * singular.sqrt()).T, vh.T * singular.sqrt()


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_tiny(activation: str) -> None:
    model = network(activation)
    scores = recorded(model, "tiny", layers=["0"]).scores()
    singular, incoming, outgoing = formulas_of_tiny(model)
    torch.testing.assert_close(scores.values["0"], -SLOPES[activation] * singular**2)
    start = scores.starts["0"]
    assert start.outgoing is not None
    found = torch.cat([start.weight, start.bias[:, None]], 1)
    torch.testing.assert_close(start.outgoing @ found, outgoing @ incoming, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=1), incoming.norm(dim=1), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_tinys_score_is_its_part_of_the_losss_derivative(activation: str) -> None:
    """The whole derivative is the score and what the reader's own best update shares with it."""
    model = network(activation)
    scaling = recorded(model, "tiny", layers=["0"])
    scores = scaling.scores()
    chosen = scaling.select(scores, 1000, 1)
    start = scores.starts["0"]
    assert start.outgoing is not None
    data = explicit(model)
    ones = torch.ones(60, 1).double()
    h = torch.cat([torch.cat([h for _, h, _ in data]), ones], 1)
    wished = -torch.cat([len(g) * g for _, _, g in data])
    own = h @ torch.linalg.lstsq(h, wished, driver="gelsd").solution
    x = torch.cat([x for x, _, _ in data])
    new = (x @ start.weight.T + start.bias) @ start.outgoing.T * SLOPES[activation]
    shared = -float((own * new).sum()) / len(x)
    before = float(loss_of(model))
    scale = 1e-5
    scaling.grow(chosen, init="tiny", scale=scale)
    slope = (float(loss_of(model)) - before) / scale
    assert slope == pytest.approx(float(scores.values["0"].sum()) + shared, rel=2e-3)


def test_a_line_search_lowers_the_loss() -> None:
    model = network()
    scaling = recorded(model, "tiny")
    chosen = scaling.select(scaling.scores(), 60, 1)
    before = float(loss_of(model))

    def loss(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float(loss_of(candidate))

    scaling.grow(chosen, init="tiny", loss=loss)
    assert float(loss_of(model)) < before - 1e-3
    record = insertions(model)[-1]
    assert record["scale"] > 0
    again = recorded(model, "tiny")
    chosen = again.select(again.scores(), 60, 1)
    with pytest.raises(ValueError, match="changes what the network computes"):
        again.grow(chosen, init="tiny", sample=batches()[0][0])


def test_the_noise_is_that_of_the_mean_over_batches() -> None:
    model = network()
    scores = recorded(model, "gradmax").scores()
    # The logits' gradients add up to 0, so one of their three directions is none.
    assert scores.values["2"].tolist() == [*scores.values["2"][:2].tolist(), 0.0]
    each = torch.stack([g.T @ x for x, _, g in explicit(model)])
    mean = each.mean(0).square().sum()
    variance = (each - each.mean(0)).square().sum() / (2 * 3)
    assert scores.snr["0"] == pytest.approx(float(mean / variance))
    assert "signal to noise" in str(scores)


def test_layers_share_one_budget_by_decrease_per_parameter() -> None:
    model = network()
    scaling = recorded(model, "gradmax")
    scores = scaling.scores()
    prices = {"0": 5 + 1 + 4, "2": 7 + 1 + 3}
    ranked = sorted(
        (value / prices[name], name) for name in prices for value in scores.values[name].tolist()
    )
    chosen = scaling.select(scores, sum(prices[name] for _, name in ranked[:3]) + 4, 1)
    taken = [name for _, name in ranked[:3]]
    assert {n: len(v) for n, v in chosen.neurons.items()} == {n: taken.count(n) for n in set(taken)}


@pytest.mark.parametrize("criterion", ["gradmax", "tiny"])
def test_the_same_again_from_the_record(criterion: str) -> None:
    model = network("relu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model).backward()
    optimizer.step()
    base = copy.deepcopy(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scaling = recorded(model, criterion)
    chosen = scaling.select(scaling.scores(), 40, 1)
    record = scaling.record(chosen, optimizer, init=criterion, scale=0.3)
    scaling.grow(chosen, optimizer, init=criterion, scale=0.3)
    assert_repeats(record, saved, base, model)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="depth=False"):
        NeuronScaling(network(), "gradmax", widen=("fc1",))
    scaling = recorded(network(), "gradmax")
    chosen = scaling.select(scaling.scores(), 40, 1)
    with pytest.raises(ValueError, match="init='gradmax'"):
        scaling.grow(chosen)
    with pytest.raises(ValueError, match="criterion 'tiny'"):
        scaling.grow(chosen, init="tiny")
    model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 2, bias=False)).double()
    with pytest.raises(ValueError, match="no bias to take that back"):
        recorded(model, "tiny")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kink", [False, True])
def test_gradmax_turned_round(kink: bool, bias: bool) -> None:
    """Where new neurons cannot start at 0 unseen, incoming weights are what is chosen."""
    layers = [nn.ReLU(), nn.Linear(7, 4, bias=bias)] if kink else [nn.Sigmoid()]
    model = nn.Sequential(
        nn.Linear(5, 7, bias=not kink),
        *(layers if kink else [nn.Sigmoid(), nn.Linear(7, 4, bias=False)]),
        nn.Tanh(),
        nn.Linear(4, 3),
    ).double()
    scaling = recorded(model, "gradmax", layers=["0"])
    scores = scaling.scores()
    n = torch.stack([g.T @ x for x, _, g in explicit(model)]).mean(0)
    _, singular, right = torch.linalg.svd(n, full_matrices=False)
    c = float(model[0].weight.detach().norm(dim=1).mean())
    start = scores.starts["0"].weight
    torch.testing.assert_close((right @ start.T).abs(), c * torch.eye(4).double())
    linear = {True: 0.5, False: 0.206621}[kink]  # E[y f(y)]
    expected = -((linear * c * singular) ** 2)
    torch.testing.assert_close(scores.values["0"], expected, rtol=1e-4, atol=1e-12)
    scaling.grow(scaling.select(scores, 30, 1), init="gradmax", sample=batches()[0][0])
    assert not model[2].weight[:, 7:].any()


class GradMaxStudent:
    """The method in a page, after the paper: one hidden layer of tanh, full batches, plain SGD."""

    def __init__(self, model: nn.Sequential, rate: float) -> None:
        self.w1, self.b1, self.w2, self.b2 = (p.detach().clone() for p in model.parameters())
        self.rate = rate

    def gradients(self, x: Tensor, y: Tensor) -> tuple[float, list[Tensor], Tensor]:
        parameters = [p.requires_grad_() for p in (self.w1, self.b1, self.w2, self.b2)]
        z = torch.tanh(x @ self.w1.T + self.b1) @ self.w2.T + self.b2
        z.retain_grad()
        loss = (z - y).square().mean()
        gradients = torch.autograd.grad(loss, [*parameters, z])
        self.w1, self.b1, self.w2, self.b2 = (p.detach() for p in parameters)
        return float(loss), list(gradients[:4]), gradients[4]

    def step(self, x: Tensor, y: Tensor) -> float:
        loss, (w1, b1, w2, b2), _ = self.gradients(x, y)
        self.w1, self.b1 = self.w1 - self.rate * w1, self.b1 - self.rate * b1
        self.w2, self.b2 = self.w2 - self.rate * w2, self.b2 - self.rate * b2
        return loss

    def grow(self, x: Tensor, y: Tensor) -> None:
        *_, g = self.gradients(x, y)
        left = torch.linalg.svd(g.T @ x).U[:, :1]
        norm = self.w2.norm(dim=0).mean()
        self.w1 = torch.cat([self.w1, torch.zeros(1, self.w1.shape[1]).double()])
        self.b1 = torch.cat([self.b1, torch.zeros(1).double()])
        self.w2 = torch.cat([self.w2, norm * left], 1)


def test_a_student_that_grows_learns_its_teacher_as_the_papers_does() -> None:
    """Evci et al.'s teacher and student: one neuron at a time, from 2 to 6 hidden ones."""
    torch.manual_seed(4)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    x = torch.randn(64, 6).double()
    y = teacher(x).detach() * 3
    student = GradMaxStudent(model, rate=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses: tuple[list[float], list[float]] = ([], [])
    for number in range(200):
        if number in (40, 80, 120, 160):
            scaling = NeuronScaling(model, "gradmax", widen=("fc1",), depth=False)
            with scaling.recording():
                (model(x) - y).square().mean().backward()
            scaling.grow(scaling.select(scaling.scores(), 10, 1), optimizer, init="gradmax")
            scaling.close()
            student.grow(x, y)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses[0].append(float(loss.detach()))
        losses[1].append(student.step(x, y))
    assert model[0].out_features == 6
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    assert losses[0][-1] < 0.3 * losses[0][39]


@pytest.mark.parametrize("criterion", ["gradmax", "tiny"])
def test_sums_survive_in_a_state(criterion: str) -> None:
    model = network()
    whole = recorded(model, criterion)
    parts = []
    for x, y in batches():
        part = NeuronScaling(model, criterion, widen=("fc1",), depth=False)
        with part.recording(loss_scale=8.0):
            (8 * F.cross_entropy(model(x), y)).backward()
        parts.append(part.state_dict())
        part.close()
    resumed = NeuronScaling(model, criterion, widen=("fc1",), depth=False)
    resumed.load_state_dict(parts)
    for name, values in whole.scores().values.items():
        torch.testing.assert_close(resumed.scores().values[name], values, rtol=1e-8, atol=1e-14)
    assert resumed.scores().snr == pytest.approx(whole.scores().snr)
    with resumed.recording(loss_scale=2.0):
        (model(batches()[0][0]).sum() * float("inf")).backward()
    assert resumed.scores().overflowed == 1
