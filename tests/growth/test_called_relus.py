"""Layers behind a relu that a hand-written forward calls as a function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import LayerInsertion, describe, grow_state, insertions, rebuild


class Mlp(nn.Module):
    """relu(fc1), relu_(norm(fc2)): one of each way to call it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        h = F.relu(self.norm(self.fc2(h)), inplace=True)
        out: Tensor = self.fc3(h)
        return out


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv1(x)).relu()
        h = torch.relu(self.conv2(h))
        out: Tensor = self.head(h.mean((2, 3)))
        return out


class Inserted(nn.Module):
    """A module with a layer behind it, written in by hand."""

    def __init__(self, module: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.module, self.layer = module, layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.module(x).clamp(min=0))
        return out


CASES = {
    "fc1": (Mlp, (6, 3)),
    "norm": (Mlp, (6, 3)),
    "conv2": (Convolutions, (2, 3, 6, 5)),
}


def build(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kind, shape = CASES[case]
    return kind().double(), torch.randn(shape, dtype=torch.float64)


def identity(model: nn.Module, case: str) -> nn.Module:
    width = 5 if case == "fc1" else 4
    if case.startswith("conv"):
        layer: nn.Module = nn.Conv2d(width, width, 3, padding=1, bias=False)
        nn.init.dirac_(layer.weight)
    else:
        layer = nn.Linear(width, width, bias=False)
        nn.init.eye_(layer.weight)
    return layer.double()


@pytest.mark.parametrize("case", CASES)
def test_merits_are_autograds_and_the_function_stays(case: str) -> None:
    model, x = build(case)
    extended = copy.deepcopy(model)
    layer = identity(model, case)
    setattr(extended, case, Inserted(extended.get_submodule(case), layer))
    assert torch.allclose(extended(x), model(x))
    (grad,) = torch.autograd.grad(extended(x).square().mean(), [layer.weight])
    expected = float(grad.square().sum())
    assert expected > 0

    kind = "conv2d_relu" if case == "conv2" else "linear_relu"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    inserter = LayerInsertion(model, sample=x)
    assert (case, kind) in {(p.name, p.kind) for p in inserter.positions}
    with inserter.recording():
        model(x).square().mean().backward()
    merits = inserter.merits()
    assert float(merits.values[merits.names.index(case)]) == pytest.approx(expected, rel=1e-9)

    optimizer.step()
    model.eval()
    before = model(x)
    record = inserter.record(case)
    states = {name: value.clone() for name, value in model.state_dict().items()}
    new = inserter.insert(case, optimizer)
    assert torch.equal(model(x), before)
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == len(
        list(model.parameters())
    )
    places = {p.name: p.relu_called for p in inserter.positions if p.name.startswith(case)}
    assert places == {f"{case}.1": False, f"{case}.2": True}
    assert model.get_submodule(f"{case}.2") is new
    grown, _ = grow_state(record, states, build=lambda: build(case)[0])
    assert all(torch.equal(grown[name], value) for name, value in model.state_dict().items())
    model.train()
    inserter.reset()
    with inserter.recording():
        model(x).square().mean().backward()
    inserter.insert(f"{case}.2", optimizer)  # and once more, behind the new one
    other, _ = build(case)
    rebuild(other, insertions(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_named_positions_follow_their_relu() -> None:
    model, x = build("fc1")
    inserter = LayerInsertion(model, ["fc1"], sample=x)
    with inserter.recording():
        model(x).square().mean().backward()
    inserter.insert("fc1")
    assert [position.name for position in inserter.positions] == ["fc1.1", "fc1.2"]
    with inserter.recording():
        model(x).square().mean().backward()
    assert inserter.merits().values.gt(0).all()


class Elsewhere(Mlp):
    """What fc1 makes is read twice, fc2's weight without a call, and relu acts on a sum."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        h = F.relu(z)
        if self.way == "twice":
            h = h + z
        if self.way == "again":
            h = h + F.relu(self.fc1(x + 1))
        if self.way == "sum":
            h = F.relu(h + x.sum())
        if self.way == "weight":
            h = h + self.fc1.weight.sum()
        out: Tensor = self.fc3(self.fc2(h))
        return out


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("twice", "but what 'fc1' makes is used elsewhere too"),
        ("again", "on what 'fc1' makes, which runs 2 times in one pass"),
        ("sum", "on what is not the output of a module"),
        ("weight", "but the weight of 'fc1' is also used in the model's own forward"),
    ],
)
def test_what_cannot_be_followed_has_a_reason(way: str, reason: str) -> None:
    torch.manual_seed(0)
    model, x = Elsewhere(way), torch.randn(6, 3)
    found = describe(model, x)
    assert reason in found.why_not("")["insert"]
    assert found.possible("insert") == ({"fc1": "linear_relu"} if way == "sum" else {})
    if way != "sum":
        with pytest.raises(ValueError, match="calls relu as a function"):
            LayerInsertion(model, sample=x)


def test_torchs_encoder_reads_its_own_weights() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    found = describe(nn.Sequential(layer, nn.Linear(8, 2)), torch.randn(2, 3, 8))
    assert (
        "reads the weights of '0.linear1' itself when it evaluates"
        in (found.why_not("0")["insert"])
    )
