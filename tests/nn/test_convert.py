"""convert exchanges exactly what the plan names, and everything else lives on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from growkernels.nn import BasisConv2d, convert
from growkernels.nn.momentum import to_factors

PLAN: dict[str, int | float] = {"stem.0": 2, "blocks.1.conv": 0.5}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + F.relu(self.norm(self.conv(x)))
        return out


class Net(nn.Module):
    """A Sequential, a ModuleList and attributes; convolutions with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h.mean((2, 3)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def low_rank(model: nn.Module, plan: dict[str, int | float]) -> None:
    """Makes the kernels named by a plan of low rank, so that converting them changes nothing."""
    twin = copy.deepcopy(model)
    convert(twin, plan)
    for path in plan:
        layer = twin.get_submodule(path)
        assert isinstance(layer, BasisConv2d)
        model.get_submodule(path).load_state_dict(layer.to_conv().state_dict())


def snapshot(model: nn.Module, optimizer: Optimizer | None = None) -> list[object]:
    """The identity and the values of all that a failing call could have changed."""
    state: list[object] = [(name, id(module)) for name, module in model.named_modules()]
    state += [(name, id(p), p.detach().clone().tolist()) for name, p in model.named_parameters()]
    if optimizer is not None:
        for group in optimizer.param_groups:
            state.append({k: list(map(id, v)) if k == "params" else v for k, v in group.items()})
        state += [(id(p), copy.deepcopy(s)) for p, s in optimizer.state.items()]
    return state


def test_exchanges_the_named_layers_and_only_those() -> None:
    model = net()
    low_rank(model, PLAN)
    untouched = {name: id(m) for name, m in model.named_modules() if name not in PLAN}
    bias = model.blocks[1].get_parameter("conv.bias")
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model.eval()
    expected = model(x)
    result = convert(model, PLAN)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    for name, identity in untouched.items():
        assert id(model.get_submodule(name)) == identity
    first, second = model.get_submodule("stem.0"), model.get_submodule("blocks.1.conv")
    assert isinstance(first, BasisConv2d)
    assert isinstance(second, BasisConv2d)
    assert (first.basis_channels, second.basis_channels) == (2, 3)
    assert second.bias is bias
    assert not first.training
    assert list(result.converted) == list(PLAN)
    assert result.skipped == {}
    record = result.converted["stem.0"]
    assert (record.filters_before, record.filters) == (6, 2)
    assert (record.weights_before, record.weights) == (162, 2 * 27 + 2 * 4)
    assert record.error < 1e-10
    assert "stem.0: 6 -> 2 trained filters, 162 -> 62 weights" in str(result)


def test_the_record_has_the_distance_of_the_kernels() -> None:
    model = net()
    before = model.get_parameter("stem.0.weight").detach()
    result = convert(model, {"stem.0": 2})
    layer = model.get_submodule("stem.0")
    assert isinstance(layer, BasisConv2d)
    distance = (layer.to_conv().weight.detach() - before).norm() / before.norm()
    assert result.converted["stem.0"].error == pytest.approx(float(distance))
    assert float(distance) > 0.1


@pytest.mark.parametrize(
    ("value", "filters"), [(1, 1), (5, 5), (0.01, 1), (0.5, 3), (0.42, 3), (5 / 6, 5)]
)
def test_numbers_and_fractions(value: int | float, filters: int) -> None:
    model = net()
    convert(model, {"blocks.0.conv": value})
    layer = model.get_submodule("blocks.0.conv")
    assert isinstance(layer, BasisConv2d)
    assert layer.basis_channels == filters


def test_what_would_save_nothing_is_skipped_with_the_reason() -> None:
    model = net()
    pointwise = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1))
    result = convert(pointwise, {"0": 4, "1": 1.0, "2": 4}, init="select")
    assert result.skipped == {
        "0": "4 filters need 48 weights, the full kernel needs 32",
        "1": "its full kernel already trains all 8 filters",
        "2": "4 filters need 64 weights, the full kernel needs 64",
    }
    assert result.converted == {}
    assert all(type(layer) is nn.Conv2d for layer in pointwise)
    # With the basis in the output, four filters of the third do save.
    assert list(convert(pointwise, {"2": 4}).converted) == ["2"]
    convert(model, {"stem.0": 2})
    layer = model.get_submodule("stem.0")
    again = convert(model, {"stem.0": 2})
    assert again.skipped == {"stem.0": "already a basis convolution with 2 filters"}
    assert model.get_submodule("stem.0") is layer
    assert "stem.0: skipped, already" in str(again)
    assert str(convert(model, {})) == "nothing to convert"


def test_there_and_back() -> None:
    model = net()
    paths = list(dict(model.named_parameters()))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    convert(model, PLAN)
    bias = model.blocks[1].get_parameter("conv.bias")
    expected = model(x)
    result = convert(model, {"stem.0": 1.0, "blocks.1.conv": 6})
    assert list(dict(model.named_parameters())) == paths
    assert type(model.get_submodule("stem.0")) is nn.Conv2d
    assert model.blocks[1].get_parameter("conv.bias") is bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert result.converted["stem.0"].weights == 162
    assert result.converted["stem.0"].error < 1e-15


def test_another_number_of_filters_later() -> None:
    model = net()
    low_rank(model, {"stem.0": 2})
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    for filters in (4, 3, 2):
        convert(model, {"stem.0": filters}, init="select" if filters == 3 else "svd")
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        assert model.get_parameter("stem.0.basis").shape[0] == filters


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.named_parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "plain sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "adamw": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    ),
    "foreach": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True, foreach=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_goes_on(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    train(model, optimizer, 2)
    scheduler.step()
    for plan in (PLAN, {"stem.0": 3}, {"stem.0": 1.0, "blocks.1.conv": 6}):
        before = {id(p): copy.deepcopy(state) for p, state in optimizer.state.items()}
        old = {id(p): p.detach().clone() for p in model.parameters()}
        convert(model, plan, optimizer)
        parameters = list(model.parameters())
        for p in parameters:
            if id(p) in old:
                assert torch.equal(p, old[id(p)])
                torch.testing.assert_close(
                    dict(optimizer.state.get(p, {})), before.get(id(p), {}), rtol=0, atol=0
                )
        assert {id(p) for p in optimizer.state} <= {id(p) for p in parameters}
        fresh = OPTIMIZERS[name](model)
        for group, expected in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            assert list(map(id, group["params"])) == list(map(id, expected["params"]))
            assert group.get("param_names") == expected.get("param_names")
        values = [(p, p.detach().clone()) for p in parameters if p.dim() > 1]
        train(model, optimizer, 2)
        scheduler.step()
        assert all(not torch.equal(p, value) for p, value in values)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0])


def test_frozen_layers_and_those_the_optimizer_does_not_hold() -> None:
    model = net()
    model.get_parameter("stem.0.weight").requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    convert(model, PLAN, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert not model.get_parameter("stem.0.basis").requires_grad
    assert not model.get_parameter("stem.0.coeff").requires_grad
    assert model.get_parameter("blocks.1.conv.coeff").requires_grad


@pytest.mark.parametrize("init", ["svd", "select"])
def test_momentum_is_what_the_same_gradients_would_have_left(init: str) -> None:
    """Without updates (lr = 0), a buffer filled before the exchange equals one filled after it.

    Kernels of low rank, so that the gradients before and after the exchange are the same.
    """
    first, second = net(), net()
    optimizers = []
    for model in (first, second):
        low_rank(model, PLAN)
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9))
    train(first, optimizers[0], 4)
    convert(first, PLAN, optimizers[0], init)
    convert(second, PLAN, optimizers[1], init)
    train(second, optimizers[1], 4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        carried = optimizers[0].state[a]["momentum_buffer"]
        filled = optimizers[1].state[b]["momentum_buffer"]
        torch.testing.assert_close(carried, filled, rtol=1e-7, atol=1e-9)
    # Back: the kernels' buffers pull back to the factors' buffers.
    back = dict.fromkeys(PLAN, 1.0)
    factors = {path: _factors(second.get_submodule(path)) for path in PLAN}
    buffers = {
        path: [
            optimizers[1].state[p]["momentum_buffer"].flatten(1)
            for p in (second.get_parameter(f"{path}.basis"), second.get_parameter(f"{path}.coeff"))
        ]
        for path in PLAN
    }
    convert(second, back, optimizers[1])
    for path in PLAN:
        weight = second.get_parameter(f"{path}.weight")
        lifted = optimizers[1].state[weight]["momentum_buffer"].flatten(1)
        for a, b in zip(to_factors(lifted, *factors[path]), buffers[path], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor, bool]:
    assert isinstance(layer, BasisConv2d)
    return layer.basis.detach().flatten(1), layer.coeff.detach(), layer.include_basis


def test_a_compiled_model_compiles_again() -> None:
    model = net()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    compiled(x)
    convert(model, PLAN)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_state_dict_loads_into_a_model_converted_by_the_same_plan() -> None:
    model, fresh = net(), Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    convert(model, PLAN, optimizer)
    train(model, optimizer, 2)
    other = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    convert(fresh, PLAN, other)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (fresh, other)):
        train(m, o, 1)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3)
        self.a = nn.Conv2d(4, 4, 3)
        self.b = self.a
        self.c = nn.Conv2d(4, 4, 3)
        self.d = nn.Conv2d(4, 4, 3)
        self.d.weight = self.c.weight
        self.e = nn.Conv2d(4, 4, 3)
        self.f = nn.Conv2d(4, 4, 3)
        self.f.bias = self.e.bias
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.wrapped = nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1)
        self.hooked = nn.Conv2d(4, 4, 3)
        self.hooked.register_forward_hook(lambda *_: None)
        self.nan = nn.Conv2d(4, 4, 3)
        self.nan.weight.data[0] = torch.inf
        self.norm = nn.BatchNorm2d(4)
        self.good = nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("nowhere", 2, "The plan names 'nowhere', which is not a module of the model"),
        ("good.weight", 2, "The plan names 'good.weight', which is not a module"),
        ("", 2, "The plan names the model itself"),
        ("norm", 2, "'norm' cannot be converted. A BatchNorm2d is not a Conv2d"),
        ("a", 2, "'a' cannot be converted. The same layer is used at 'a' and 'b'"),
        ("c", 2, "The same parameter is used at 'c.weight' and 'd.weight'"),
        ("e", 2, "used at 'e.bias' and 'f.bias'"),
        ("grouped", 2, "'grouped' cannot be converted. The convolution has groups=2"),
        ("wrapped", 2, "padding_mode='reflect'"),
        ("hooked", 2, "carries hooks"),
        ("nan", 2, "'nan' cannot be converted. The convolution's weight contains NaN or infinity"),
        ("c", 0, "'c' cannot be converted"),
        ("good", 0, "basis_channels is 0"),
        ("good", 5, "takes 1 to 4"),
        ("good", 0.0, "The plan asks for 0.0"),
        ("good", 1.5, "The plan asks for 1.5"),
        ("good", float("nan"), "The plan asks for nan"),
        ("good", True, "The plan asks for True"),
        ("good", "2", "The plan asks for '2'"),
    ],
)
def test_bad_plans_leave_everything_untouched(path: str, value: float, sentence: str) -> None:
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        convert(model, {"first": 2, path: value}, optimizer)
    assert sentence in str(caught.value)
    assert repr(snapshot(model, optimizer)) == repr(before)


def test_bad_arguments_leave_everything_untouched() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model, optimizer)
    other = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        convert(model, PLAN, other)
    with pytest.raises(TypeError, match="LBFGS lays out its state"):
        convert(model, PLAN, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match="optimizer is a str"):
        convert(model, PLAN, "adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown init 'random'"):
        convert(model, PLAN, optimizer, init="random")
    with pytest.raises(TypeError, match=r"pass model\.module"):
        convert(nn.DataParallel(model), {"module.stem.0": 2}, optimizer)
    with pytest.raises(TypeError, match=r"The model is a NoneType; pass a torch\.nn\.Module"):
        convert(None, PLAN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="The plan is a list; pass a dictionary"):
        convert(model, list(PLAN), optimizer)  # type: ignore[arg-type]
    assert snapshot(model, optimizer) == before


def test_an_error_midway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)
    calls = []

    def broken(*arguments: object) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return to_factors(*arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(convert.__globals__, "to_factors", broken)
    with pytest.raises(KeyboardInterrupt):
        convert(model, PLAN, optimizer)
    assert len(calls) == 2
    assert repr(snapshot(model, optimizer)) == repr(before)
    monkeypatch.undo()
    convert(model, PLAN, optimizer)
    assert repr(snapshot(model, optimizer)) != repr(before)
