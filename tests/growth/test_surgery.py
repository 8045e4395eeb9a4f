"""Edits of modules and optimizers: what is inserted where, and that all else survives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_networks import batches, mlp, recorded, resnet
from torch import Tensor, nn
from torch.optim import Optimizer
from training import train

from growkernels.growth import LayerInsertion, insertions
from growkernels.growth.surgery import insert_after
from growkernels.nn import ResidualBlock

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    "adamw": lambda m: split_adamw(m),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5),
    "foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True, amsgrad=True),
}


def split_adamw(model: nn.Module) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": 0.1},
            {"params": no_decay, "weight_decay": 0.0, "lr": 3e-3},
        ],
        lr=1e-2,
    )


def snapshot(optimizer: Optimizer) -> dict[int, dict[str, object]]:
    return {
        id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        for p, state in optimizer.state.items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("build", [mlp, resnet])
def test_optimizer_state_survives(name: str, build: Callable[[], nn.Sequential]) -> None:
    model = build()
    optimizer = OPTIMIZERS[name](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    train(model, optimizer, 3 * batches(model, 1, 12))
    scheduler.step()
    before = snapshot(optimizer)
    parameters = {id(p): p.detach().clone() for p in model.parameters()}
    new = recorded(model).insert("1", optimizer)
    for p in model.parameters():
        if id(p) in parameters:
            assert torch.equal(p, parameters[id(p)])
    after = snapshot(optimizer)
    for key in after.keys() - before.keys():  # a new parameter's, as torch begins it
        assert all(not value.any() for value in after[key].values())
    for key, state in before.items():
        torch.testing.assert_close(after[key], state, rtol=0, atol=0)
    old = [p.detach().clone() for p in new.parameters()]
    train(model, optimizer, batches(model, 1, 12))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0])
    changed = [not torch.equal(a, b) for a, b in zip(old, new.parameters(), strict=True)]
    assert any(changed)
    assert all(p in optimizer.state for p in model.parameters())


def test_existing_parameters_train_on_as_if_nothing_was_inserted() -> None:
    # With the new layer frozen at the identity, the grown network is the old one.
    plain, grown = mlp(), mlp()
    for model in (plain, grown):
        optimizer = split_adamw(model)
        train(model, optimizer, 3 * batches(model, 1, 12))
        if model is grown:
            recorded(model).insert("3", optimizer).requires_grad_(False)
        train(model, optimizer, 3 * batches(model, 1, 12))
    old = [p for p in grown.parameters() if p.requires_grad]
    for a, b in zip(plain.parameters(), old, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("build", [mlp, resnet])
def test_groups_and_order_are_those_of_an_optimizer_built_afterwards(
    build: Callable[[], nn.Sequential],
) -> None:
    model = build()
    optimizer = split_adamw(model)
    for _ in range(3):
        inserter = recorded(model)
        inserter.insert(inserter.positions[0].name, optimizer)
        fresh = split_adamw(model)
        for group, expected in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            assert list(map(id, group["params"])) == list(map(id, expected["params"]))
            assert group["weight_decay"] == expected["weight_decay"]


def test_named_parameter_groups_keep_their_names() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    recorded(model).insert("1", optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 4), nn.Linear(4, 2)
        self.act = nn.ReLU()
        self.blocks = nn.ModuleList([ResidualBlock(4), ResidualBlock(4)])
        self.named = nn.Sequential()
        self.named.add_module("lin", nn.Linear(4, 4))
        self.named.add_module("relu", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.fc2(self.named(h))
        return out


def test_attributes_lists_and_named_children() -> None:
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inserter = LayerInsertion(model, ["act", "blocks.0", "named.relu"])

    def insert(name: str) -> None:
        with inserter.recording():
            model(x).square().sum().backward()
        inserter.insert(name, optimizer, sample=x)

    x = torch.randn(6, 2, dtype=torch.float64)
    expected = model(x)
    for name in ("act", "blocks.0", "named.relu"):
        insert(name)
    assert [p.name for p in inserter.positions] == [
        "act.0",
        "act.1",
        "blocks.0.0",
        "blocks.0.1",
        "named.relu",
        "named.relu_grown1",
    ]
    assert list(model.named._modules) == ["lin", "relu", "relu_grown1"]
    insert("named.relu")
    insert("act.0")
    assert list(model.named._modules) == ["lin", "relu", "relu_grown2", "relu_grown1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))


def test_a_sequential_with_its_own_forward_is_not_reordered() -> None:
    class Skipping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self[2](self[1](self[0](x)))
            return out

    model = Skipping(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(4, 2)
    assert insert_after(model, "1", nn.Identity()) == "1.1"
    assert isinstance(model[2], nn.Linear)
    recorded(model, {"1.0": "linear_relu"}).insert("1.0", sample=x)


def test_new_layers_take_dtype_and_mode_of_their_neighbours() -> None:
    model = mlp(dtype=torch.float32).bfloat16()
    model[1].eval()
    new = recorded(model).insert("1")
    assert all(p.dtype == torch.bfloat16 for p in new.parameters())
    assert not new.training


def unchanged(model: nn.Module, optimizer: Optimizer) -> Callable[[], bool]:
    names = [name for name, _ in model.named_modules()]
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    return lambda: (
        names == [name for name, _ in model.named_modules()]
        and groups == [list(map(id, group["params"])) for group in optimizer.param_groups]
        and insertions(model) == []
    )


def test_failures_leave_model_and_optimizer_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = split_adamw(model)
    same = unchanged(model, optimizer)
    inserter = recorded(model)

    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds none of the model's Linear or Conv2d weights"):
        inserter.insert("1", other)
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match="LBFGS lays out its state"):
        inserter.insert("1", lbfgs)
    with pytest.raises(TypeError, match="optimizer is a str"):
        inserter.insert("1", "adam")  # type: ignore[arg-type]
    assert same()

    def broken(*args: object) -> None:
        raise OSError("midway")

    with monkeypatch.context() as patch:
        patch.setattr("growkernels.growth.layer_insertion.driver.check_same_output", broken)
        with pytest.raises(OSError, match="midway"):
            inserter.insert("1", optimizer, sample=torch.randn(3, 2).double())
    assert same()
    inserter.insert("1", optimizer)
    assert not same()


def test_a_network_whose_forward_uses_indices_is_noticed_with_a_sample() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)
            )

        def forward(self, x: Tensor) -> Tensor:
            for index in range(5):
                x = self.layers[index](x)
            return x

    model = Indexed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same = unchanged(model, optimizer)
    with pytest.raises(RuntimeError, match="would change the network's output"):
        recorded(model).insert("layers.1", optimizer, sample=torch.randn(4, 2))
    assert same()


def test_insert_after_a_path_that_does_not_exist() -> None:
    for name in ("9", "0.weight", "a.b"):
        with pytest.raises(ValueError, match="There is no module at"):
            insert_after(mlp(), name, nn.Identity())
