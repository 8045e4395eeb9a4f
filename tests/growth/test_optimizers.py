"""Every optimizer of torch under every surgery: it works, or is refused before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from all_surgeries import Attending
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import convert, separate_attention

Parameters = Iterable[nn.Parameter]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "fused": True},
        {"momentum": 0.9, "dampening": 0.5, "fused": True},
        {"momentum": 0.9, "nesterov": True, "foreach": True},
        {"momentum": 0.9, "maximize": True, "fused": True},
        {"fused": True},
    ],
    "Adam": [
        {"amsgrad": True},
        {"amsgrad": True, "fused": True},
        {"amsgrad": True, "foreach": True, "maximize": True},
    ],
    "AdamW": [{"amsgrad": True, "fused": True}, {"foreach": True}],
    "Adagrad": [{}, {"fused": True}, {"foreach": True}],
    "Adadelta": [{}, {"foreach": True, "maximize": True}],
    "Adafactor": [{}, {"foreach": True}],
    "Adamax": [{}, {"foreach": True}],
    "ASGD": [{"t0": 2}, {"t0": 2, "foreach": True}],
    "LBFGS": [{"max_iter": 1}],
    "Muon": [{}],
    "NAdam": [{}, {"foreach": True, "decoupled_weight_decay": True}],
    "RAdam": [{}, {"foreach": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True}, {"momentum": 0.9, "foreach": True}],
    "Rprop": [{}, {"foreach": True}],
}
CASES = [(name, options) for name, listed in OPTIONS.items() for options in listed]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 2, 1),
        nn.Flatten(),
        Attending(),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def train(model: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(7)

    def loss() -> Tensor:
        x, y = torch.randn(6, 8, generator=generator), torch.arange(6) % 3
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def inserted(model: nn.Module, optimizer: Optimizer) -> None:
    inserter = LayerInsertion(model)
    with inserter.recording():
        F.cross_entropy(model(torch.randn(6, 8)), torch.arange(6) % 3).backward()
    model.zero_grad()
    try:
        inserter.insert("8", optimizer)
    finally:
        inserter.close()


def widened(model: nn.Module, optimizer: Optimizer) -> None:
    scaling = NeuronScaling(model, "magnitude", layers=["5", "7"], widen=("fc1",), depth=False)
    scaling.grow(scaling.select(scaling.scores(), budget=40, min_eligible=1), optimizer)


def deepened(model: nn.Module, optimizer: Optimizer) -> None:
    scaling = NeuronScaling(model, "magnitude", layers=["5"], kinds=("linear", "conv2d"))
    scaling.grow(scaling.select(scaling.scores(), budget=40, min_eligible=1), optimizer)


def converted(model: nn.Module, optimizer: Optimizer) -> None:
    done = convert(model, {"1": 1, "2": 1}, optimizer)
    assert len(done.converted) == 2


def converted_back(model: nn.Module, optimizer: Optimizer) -> None:
    convert(model, {"1": 1.0}, optimizer)
    assert type(model.get_submodule("1")) is nn.Conv2d


def rebuilt(model: nn.Module, optimizer: Optimizer) -> None:
    other = copy.deepcopy(model)
    inserted(other, torch.optim.SGD(other.parameters(), lr=0.1))
    scaling = NeuronScaling(other, "magnitude", widen=("fc1",))
    scaling.grow(scaling.select(scaling.scores(), budget=200, min_eligible=1))
    rebuild(model, insertions(other), optimizer)


Surgery = Callable[[nn.Module, Optimizer], object]
SURGERIES: dict[str, Surgery] = {
    "insert": inserted,
    "widen": widened,
    "deepen": deepened,
    "convert": converted,
    "convert back": converted_back,
    "separate attention": separate_attention,
    "rebuild": rebuilt,
}
# Everything else works. Adagrad's state of a widened parameter exists, that of a new one does not.
REFUSED = {
    "LBFGS": set(SURGERIES),
    "Adagrad": set(SURGERIES) - {"widen"},
    "Adafactor": {"widen", "separate attention", "rebuild"},
    "Muon": {"insert", "deepen", "rebuild", "convert back"},
}


def parameters_for(model: nn.Module, name: str) -> Parameters:
    return (p for p in model.parameters() if name != "Muon" or p.dim() == 2)


def contents(model: nn.Module, optimizer: Optimizer) -> tuple[list[Any], list[Any]]:
    """All that a refused surgery must leave alone, by identity and by value."""
    identities: list[Any] = [(path, id(module)) for path, module in model.named_modules()]
    identities += [(name, id(p)) for name, p in model.named_parameters()]
    identities += [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    identities += [
        (id(p), key, id(value)) for p, s in optimizer.state.items() for key, value in s.items()
    ]
    state = copy.deepcopy(optimizer.state_dict())
    values = [*model.state_dict().values(), *_tensors(state)]
    return identities, [value.detach().clone() for value in values]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_works_or_is_refused_before_anything_changes(
    name: str, options: dict[str, Any], surgery: str
) -> None:
    model = network()
    if surgery == "convert back":
        convert(model, {"1": 1})
    optimizer: Optimizer = getattr(torch.optim, name)(
        parameters_for(model, name), **{"lr": 0.01, **options}
    )
    train(model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = contents(model, optimizer)
    states = {id(p): dict(state) for p, state in optimizer.state.items()}
    if surgery in REFUSED.get(name, ()):
        with pytest.raises((TypeError, ValueError), match="optimizer"):
            SURGERIES[surgery](model, optimizer)
        after = contents(model, optimizer)
        assert after[0] == before[0]
        for a, b in zip(after[1], before[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        train(model, optimizer)
        return
    SURGERIES[surgery](model, optimizer)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    # A new coefficient matrix stays outside of Muon, as the kernel did that was no matrix.
    expected = {id(p) for p in parameters_for(model, name)}
    assert set(ids) <= expected if name == "Muon" else set(ids) == expected
    for parameter, state in optimizer.state.items():
        assert id(parameter) in ids
        if id(parameter) in held:
            for key, value in state.items():
                assert value is states[id(parameter)][key]
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer)
    if surgery != "rebuild" and name != "Muon":  # a rebuilt branch waits for the loaded values
        for parameter, value in zip(model.parameters(), kept, strict=True):
            assert not torch.equal(parameter, value)


def test_fused_and_foreach_sgd_go_on_the_same_way() -> None:
    """A momentum of 0 that the fused kernel needs is as good as none."""
    models = []
    for fused in (True, False):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        train(model, optimizer)
        torch.manual_seed(0)
        inserted(model, optimizer)
        convert(model, {"1": 1}, optimizer)
        deepened(model, optimizer)
        train(model, optimizer)
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_fresh_fused_sgd_stays_without_momentum() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    inserted(model, optimizer)
    assert not any(optimizer.state.values())
    train(model, optimizer)


@pytest.mark.parametrize("surgery", SURGERIES)
def test_sparse_adam_is_refused(surgery: str) -> None:
    model = network()
    if surgery == "convert back":
        convert(model, {"1": 1})
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    before = contents(model, optimizer)
    with pytest.raises(TypeError, match="SparseAdam takes sparse gradients alone"):
        SURGERIES[surgery](model, optimizer)
    assert contents(model, optimizer)[0] == before[0]


class Lookahead(Optimizer):
    """Shares its groups with the optimizer that it wraps, as most such optimizers do."""

    def __init__(self, base: Optimizer, shares_state: bool, place: str) -> None:
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = base.state if shares_state else {}  # type: ignore[assignment]
        self.base: Any = {"plain": base, "list": [base], "dict": {"base": base}}[place]
        self._step = base.step

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._step(closure)


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("shares_state", [True, False])
@pytest.mark.parametrize("place", ["plain", "list", "dict"])
def test_optimizers_that_wrap_another_are_refused(
    surgery: str, shares_state: bool, place: str
) -> None:
    model = network()
    if surgery == "convert back":
        convert(model, {"1": 1})
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = Lookahead(base, shares_state, place)
    train(model, optimizer)
    before = contents(model, base)
    with pytest.raises(TypeError, match=r"Lookahead wraps an optimizer \(SGD, its 'base'\)"):
        SURGERIES[surgery](model, optimizer)
    assert contents(model, base)[0] == before[0]
    train(model, optimizer)


class Other(Optimizer):
    """Keeps something under the name of SGD's momentum."""

    def __init__(self, params: Parameters) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["momentum_buffer"] = state.get("momentum_buffer", 0) + parameter.grad.sign()
            parameter.sub_(0.01 * state["momentum_buffer"])


def test_a_momentum_of_unknown_meaning_is_not_dropped() -> None:
    model = network()
    optimizer = Other(model.parameters())
    train(model, optimizer)
    with pytest.raises(TypeError, match="Other keeps a 'momentum_buffer'"):
        converted(model, optimizer)
    assert type(model[1]) is nn.Conv2d
    inserted(model, optimizer)
    deepened(model, optimizer)
    train(model, optimizer)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("LBFGS", "Muon", "Adafactor")])
@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
def test_torch_itself_takes_no_module_parameters_here(name: str, flag: str) -> None:
    """Why the two flags are in no case above: on the CPU, plain training stops with them.

    (A step is in place: parameters that it could be differentiated through are no leaves, so no
    module's.)
    """
    model = network()
    try:
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **{flag: True})
    except TypeError:
        pytest.skip(f"{name} has no such flag")
    with pytest.raises((RuntimeError, AssertionError)):
        train(model, optimizer)
