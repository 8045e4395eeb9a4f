"""Branches of grown layers: what they compute, where they start and how they train."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from growkernels.nn import GrownConv2d, GrownLinear
from growkernels.nn.grown_layers import FORMS, Branch, with_branches

OUTPUTS = [4, 1, 2]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def filled(module: nn.Module, seed: int = 0) -> None:
    for number, parameter in enumerate(module.parameters()):
        parameter.data = randn(*parameter.shape, seed=100 * seed + number)


def with_branch(layer: nn.Linear | nn.Conv2d, form: str, gain: float = 2.0) -> Branch:
    """A branch on OUTPUTS that is part of layer by now, started at random values."""
    branch = Branch(layer, OUTPUTS, form, gain)
    shape = (len(OUTPUTS), *layer.weight.shape[1:])
    branch.start_at(randn(*shape, seed=5), randn(len(OUTPUTS), seed=6))
    assert isinstance(layer, GrownLinear | GrownConv2d)
    layer.branches.append(branch)
    return branch


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_branch_changes_nothing_and_a_trained_one_is_the_formula(
    form: str, bias: bool
) -> None:
    layer = with_branches(nn.Linear(6, 5, bias=bias, dtype=torch.float64))
    x = randn(2, 7, 6)
    before = layer(x)
    branch = with_branch(layer, form, gain=1.7)
    assert torch.equal(layer(x), before)
    filled(branch)
    p = {name: value.detach() for name, value in branch.named_parameters()}

    def linear(name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(3, dtype=x.dtype))

    if form == "pair":
        z, gate = linear("plus") + linear("minus"), torch.ones(3, dtype=x.dtype)
    else:
        z = linear("linear") * (1.7 if form == "single" else 1)
        gate = p.get("gate", torch.ones(3, dtype=x.dtype))
    expected = before.clone()
    for number, output in enumerate(OUTPUTS):
        expected[..., output] += (gate * (gelu(z) + z))[..., number]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_convolutions_grow_alike(form: str) -> None:
    conv = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=(1, 2), dtype=torch.float64)
    layer = with_branches(conv)
    x = randn(2, 3, 9, 8)
    before = conv(x)
    branch = with_branch(layer, form)
    assert torch.equal(layer(x), before)
    filled(branch)
    z = torch.zeros_like(before[:, :3])
    for name, child in branch.named_children():
        if isinstance(child, nn.Conv2d):
            out = F.conv2d(x, child.weight, child.bias, 2, 1, (1, 2))
            z = z + out * (2 if form == "single" and name == "linear" else 1)
    gate = branch.gate if form == "gated" else torch.ones(3, dtype=x.dtype)
    expected = before.clone()
    expected[:, OUTPUTS] += gate.view(-1, 1, 1) * (gelu(z) + z)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_many_branches_are_one_product_unless_somebody_watches(kind: str) -> None:
    base = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 3, padding=1)
    layer = with_branches(base.double())
    x = randn(4, 6) if kind == "linear" else randn(2, 6, 4, 4)
    for form in ("single", "pair", "gated", "single", "gated"):
        filled(with_branch(layer, form))
    with FlopCounterMode(display=False) as counter:
        together = layer(x)
    products = counter.get_flop_counts()["Global"]
    rows = 5 + 3 * 3 + 2 * 3  # of the layer itself, bare branches, gated ones: half of two pairs
    assert sum(products.values()) == 2 * rows * x.numel() * (9 if kind == "convolution" else 1)

    seen: list[nn.Module] = []
    watched = [m for branch in layer.branches for m in branch.children()]
    handles = [m.register_forward_hook(lambda m, i, o: seen.append(m)) for m in watched]
    torch.testing.assert_close(layer(x), together)
    assert set(seen) == set(watched)
    for handle in handles:
        handle.remove()
    assert torch.equal(layer(x), together)


def train(network: nn.Module, optimizer: Optimizer) -> None:
    for step in range(25):
        x, y = randn(8, 6, seed=step), randn(8, 2, seed=1000 + step)
        optimizer.zero_grad()
        F.mse_loss(network(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "gain"),
    [
        (SGD, {"lr": 0.05}, math.sqrt(2)),
        (SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}, math.sqrt(2)),
        (AdamW, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-30}, 2.0),
    ],
)
def test_the_pair_trains_like_the_single_neuron(
    kind: type[Optimizer], options: dict[str, Any], gain: float
) -> None:
    """Same outputs after 25 steps, with half the new parameters and whatever the pair starts at."""
    results, sizes = [], []
    for form in ("pair", "single"):
        torch.manual_seed(0)
        layer = with_branches(nn.Linear(6, 5))
        network = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 2)).double()
        branch = with_branch(layer, form, gain)
        train(network, kind(network.parameters(), **options))
        results.append(network(randn(20, 6, seed=77)).detach())
        sizes.append(sum(p.numel() for p in branch.parameters()))
        if form == "pair":
            moved = branch.plus.weight + branch.minus.weight
            assert float(moved.detach().abs().max()) > 0.01
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)
    assert sizes[0] == 2 * sizes[1]


def test_the_gate_feels_the_splitting_matrix_where_the_pair_feels_nothing() -> None:
    """At a saddle, where dL/dw_i = 0, the gate's gradient is a.S a / 2 and the pair's is 0."""
    x, delta = randn(40, 6), randn(40, 5, seed=1)
    ones = torch.cat([x, torch.ones(40, 1, dtype=x.dtype)], 1)
    delta = delta - ones @ torch.linalg.lstsq(ones, delta).solution  # now X^T delta = 0
    gradients = {}
    for form in ("pair", "gated"):
        layer = with_branches(nn.Linear(6, 5, dtype=torch.float64))
        branch = Branch(layer, OUTPUTS, form)
        layer.branches.append(branch)
        a = 1e-3 * randn(3, 6, seed=2)
        branch.start_at(a, torch.zeros(3, dtype=a.dtype))
        (layer(x) * delta).sum().backward()
        gradients[form] = {name: p.grad for name, p in branch.named_parameters()}
    s = math.sqrt(2 / math.pi) * torch.einsum("mi,md,me->ide", delta[:, OUTPUTS], x, x)
    expected = torch.einsum("id,ide,ie->i", a, s, a) / 2
    torch.testing.assert_close(gradients["gated"]["gate"], expected, rtol=1e-4, atol=1e-12)
    assert float(expected.abs().min()) > 1e-9
    for name, gradient in gradients["pair"].items():
        assert float(gradient.abs().max()) < 1e-12, name  # type: ignore[union-attr]


def test_a_layer_becomes_grown_with_its_parameters_hooks_and_mode() -> None:
    layer = nn.Linear(3, 5).eval()
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    new = with_branches(layer)
    assert new.weight is layer.weight
    assert new.bias is layer.bias
    assert not new.training
    assert with_branches(new) is new
    new(torch.zeros(1, 3))
    assert calls == [1]
    assert new is layer
    with_branch(new, "gated")
    twin = copy.deepcopy(new)
    twin.load_state_dict(new.state_dict())
    assert [name for name, _ in twin.named_parameters()] == [
        "weight",
        "bias",
        "branches.0.gate",
        "branches.0.linear.weight",
        "branches.0.linear.bias",
    ]


class Negated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


def test_what_cannot_be_grown() -> None:
    with pytest.raises(TypeError, match="Negated cannot be grown"):
        with_branches(Negated(2, 2))
    with pytest.raises(ValueError, match="groups=2"):
        with_branches(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="Unknown form 'triple'"):
        Branch(nn.Linear(2, 2), [0], "triple")
    with pytest.raises(ValueError, match="at least one output"):
        Branch(nn.Linear(2, 2), [], "pair")
