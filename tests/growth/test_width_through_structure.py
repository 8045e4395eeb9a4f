"""Wider layers found in a forward of any form, with what stands between them and their readers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import NeuronScaling, grow_state, insertions, rebuild
from growkernels.growth.neuron_scaling import Selection

Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """conv, norm, relu, conv, norm, added to what came in."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(inner)))


class GatedMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Network(nn.Module):
    def __init__(self, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block(4, norm)
        self.chain1 = nn.Conv2d(4, 6, 1)
        self.chain_norm = norm(6)
        self.chain2 = nn.Conv2d(6, 4, 3)
        self.mlp = GatedMlp(4, 6)
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.chain2(F.gelu(self.chain_norm(self.chain1(x)))).mean((2, 3))
        x = x + self.mlp(x)
        y: Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return y


ROLES = ("fc1", "conv", "gated")
WIDER = {"block.conv1", "chain1", "mlp.gate", "fc1"}


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def scaling_of(model: nn.Module, **options: Any) -> NeuronScaling:
    return NeuronScaling(
        model,
        "magnitude",
        **{
            "kinds": ("linear", "conv2d"),
            "widen": ROLES,
            "depth": False,
            "sample": images(),
            **options,
        },
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(3)).backward()
        optimizer.step()


def chosen_by(scaling: NeuronScaling, budget: float = 500, **options: Any) -> Selection:
    return scaling.select(scaling.scores(), budget, 1, **options)


NORMS: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_function_stays_and_training_goes_on(norm: str, kind: str) -> None:
    model = Network(NORMS[norm])
    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
    train(model, optimizer)
    scaling = scaling_of(model)
    # Groups of 2 and 3 channels come whole.
    assert set(scaling.layers) == WIDER
    chosen = chosen_by(scaling)
    assert set(chosen.neurons) == WIDER
    if norm == "group":
        assert len(chosen.neurons["block.conv1"]) % 2 == 0
        assert len(chosen.neurons["chain1"]) % 3 == 0
    size = sum(p.numel() for p in model.parameters())
    before, training = model.eval()(images()), copy.deepcopy(model).train()(images())
    scaling.grow(chosen, optimizer, sample=images())
    assert sum(p.numel() for p in model.parameters()) == size + chosen.parameters
    torch.testing.assert_close(model(images()), before, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.train()(images()), training, rtol=1e-10, atol=1e-12)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    train(model, optimizer, 2)
    for new in (model.block.conv2.weight[:, 4:], model.mlp.down.weight[:, 6:]):
        assert bool(new.detach().any())
    assert set(scaling.layers) == WIDER


def test_copies_of_parents_know_what_their_norm_will_see() -> None:
    """Running statistics of a share s of a channel are s times its mean, s^2 its variance."""
    model = Network()
    model.train()
    for _ in range(200):
        model(images())
    scaling = scaling_of(model, layers=["block.conv1"], widen=("conv",))
    chosen = chosen_by(scaling, 200)
    scaling.grow(chosen, scale=0.5)
    model(images())
    norm = model.block.norm1
    seen = norm.running_mean, norm.running_var
    parents = list(chosen.neurons["block.conv1"])
    torch.testing.assert_close(seen[0][4:], 0.5 * seen[0][parents], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen[1][4:], 0.25 * seen[1][parents], rtol=1e-3, atol=1e-6)


def test_the_same_again_from_the_record() -> None:
    model = Network()
    base = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scaling = scaling_of(model)
    chosen = chosen_by(scaling)
    record = scaling.record(chosen, optimizer)
    scaling.grow(chosen, optimizer)
    twin = copy.deepcopy(base)
    rebuild(twin, insertions(model))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(images()), model.eval()(images()), rtol=0, atol=0)
    grown, state = grow_state(record, *saved, build=Network)
    assert state is not None
    for name, value in model.state_dict().items():
        assert torch.equal(grown[name], value), name
    for number, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(state["state"][number][key], value)


def test_why_not_the_others() -> None:
    scaling = scaling_of(Network())
    assert "added to what" in scaling.left_out["block.conv2"]
    assert "together with 'mlp.gate'" in scaling.left_out["mlp.up"]
    with pytest.raises(ValueError, match="No layer can be widened as 'conv': it needs sample="):
        scaling_of(Network(), sample=None, widen=("conv",))


def test_a_record_that_does_not_fit_changes_nothing() -> None:
    model = Network(NORMS["group"])
    record = scaling_of(model).record(chosen_by(scaling_of(model)))
    entry = next(e for e in record["width"] if e["layer"] == "chain1")
    other = Network(NORMS["group"])
    kept = copy.deepcopy(other.state_dict())
    for change in ({"neurons": 1}, {"norms": ["fc1"]}, {"readers": ["nowhere"]}):
        with pytest.raises(ValueError, match=r"whole groups|no normalisation|no linear layer"):
            rebuild(other, [{**record, "width": [{**entry, **change}]}])
        for name, value in other.state_dict().items():
            assert torch.equal(value, kept[name])


def test_widths_are_multiples() -> None:
    scaling = scaling_of(Network(), layers=["fc1", "chain1"], widen=("fc1", "conv"))
    chosen = chosen_by(scaling, 10_000, round_to=4)
    assert {name: len(n) for name, n in chosen.neurons.items()} == {"fc1": 8, "chain1": 6}
    scaling = scaling_of(Network(), layers=["chain1"], widen=("conv",))
    chosen = chosen_by(scaling, 100, round_to=8)
    assert {name: len(n) for name, n in chosen.neurons.items()} == {"chain1": 2}
    scaling.grow(chosen)
    assert scaling.model.chain1.out_channels == 8
    with pytest.raises(ValueError, match="too small for 8 neurons"):
        chosen_by(scaling, 5, round_to=8)
    with pytest.raises(ValueError, match="round_to is 0"):
        chosen_by(scaling, 60, round_to=0)


def test_budgets_in_operations_are_exact() -> None:
    from growkernels.growth.neuron_scaling import forward_flops

    model = Network()
    before = forward_flops(model, images())
    scaling = scaling_of(model)
    chosen = chosen_by(scaling, before / 4, unit="flops", sample=images())
    scaling.grow(chosen)
    added = forward_flops(model, images()) - before
    assert f"for {added} of " in chosen.reason
    assert before / 8 < added <= before / 4


def test_budgets_in_seconds_are_spent() -> None:
    scaling = scaling_of(Network())
    chosen = chosen_by(scaling, 1.0, unit="seconds", sample=images())
    assert sum(map(len, chosen.neurons.values())) == 4 + 6 + 6 + 8  # a second pays for all
    with pytest.raises(ValueError, match="too small for one neuron"):
        chosen_by(scaling, 1e-12, unit="seconds", sample=images())
    with pytest.raises(ValueError, match="pass sample="):
        chosen_by(scaling, 1.0, unit="seconds")
