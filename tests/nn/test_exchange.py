"""What a layer carries is kept through an exchange, or refused in a sentence before it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import spectral_norm as hooked_spectral_norm
from torch.nn.utils.weight_norm import weight_norm as hooked_weight_norm

from growkernels.nn import BasisConv2d, convert, separate_attention
from growkernels.nn.exchange import obstacle, places_of, undone_on_error
from growkernels.nn.weights import current_value, sources, weight_parameters, why_computed


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


Make = Callable[[nn.Module, str], object]


def custom(layer: nn.Module, name: str) -> None:
    parametrize.register_parametrization(layer, name, Doubled())


def assigned(layer: nn.Module, name: str) -> None:
    """A weight that somebody computes by hand, as hypernetworks do."""
    own = getattr(layer, name)
    delattr(layer, name)
    layer.register_parameter(f"{name}_own", own)
    setattr(layer, name, own * 1.5)


def pruned_twice(layer: nn.Module, name: str) -> None:
    for _ in range(2):
        prune.random_unstructured(layer, name, amount=0.3)


COMPUTED: dict[str, Make] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "custom parametrization": custom,
    "old weight_norm": hooked_weight_norm,
    "old spectral_norm": hooked_spectral_norm,
    "pruned": lambda layer, name: prune.l1_unstructured(layer, name, amount=0.4),
    "pruned twice": pruned_twice,
    "assigned": assigned,
}
computed = pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())


@computed
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_the_current_value_is_what_an_evaluation_computes_with(
    make: Make,
) -> None:
    layer = nn.Linear(3, 4).double()
    make(layer, "weight")
    x = torch.eye(3, dtype=torch.float64)
    layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():  # an optimizer's step: hooks' attributes are stale
            parameter.add_(0.1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    value = current_value(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.training
    if make is not assigned:
        expected = (layer.eval()(x) - layer.bias).T
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert not value.requires_grad
    found = sources(layer, "weight")
    assert {id(p) for p in found} == {id(p) for p in layer.parameters()} - {id(layer.bias)}
    assert weight_parameters(layer)[0].shape == (4, 3)
    assert why_computed(layer)


def test_ordinary_parameters_are_their_own_source() -> None:
    layer = nn.Conv2d(2, 3, 3)
    assert sources(layer, "weight") == [layer.weight]
    assert sources(layer, "bias") == [layer.bias]
    assert sources(nn.Linear(2, 2, bias=False), "bias") == []
    assert why_computed(layer) is None
    basis = BasisConv2d(2, 6, 3, 2)
    assert {id(p) for p in weight_parameters(basis)} == {id(basis.basis), id(basis.coeff)}
    assert weight_parameters(nn.LayerNorm(3)) == []


@computed
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_convert_refuses_computed_weights(make: Make, name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))
    if name == "weight":
        make(model[0], "weight")
    else:
        prune.random_unstructured(model[0], "bias", amount=0.5)
    before = dict(model[0].__dict__)
    with pytest.raises(ValueError, match=f"'0' cannot be converted.*[Ii]ts {name} is .*ordinary"):
        convert(model, {"1": 2, "0": 2})
    assert type(model[1]) is nn.Conv2d
    assert model[0].__dict__ == before


@computed
@pytest.mark.parametrize("name", ["basis", "coeff"])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_convert_refuses_basis_convolutions_with_computed_factors(make: Make, name: str) -> None:
    model = nn.Sequential(BasisConv2d(3, 6, 3, 2))
    make(model[0], name)
    layer = model[0]
    with pytest.raises(ValueError, match=f"[Ii]ts {name} is .*ordinary parameter first"):
        convert(model, {"0": 1.0})
    assert model[0] is layer


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "gradient mask": lambda m: m.weight.register_hook(lambda g: g * 0),
    "post-accumulate": lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None),
    "several gradients": lambda m: torch.autograd.graph.register_multi_grad_hook(
        [m.weight], lambda grads: None
    ),
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "pre-forward": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "pre-backward": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "state dict": lambda m: m._register_state_dict_hook(lambda *_: None),
    "state dict, after": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "state dict, before": lambda m: m.register_state_dict_pre_hook(lambda *_: None),
    "loading, before": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
    "loading, after": lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_convert_refuses_to_lose_hooks(hook: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))
    conv = model[0]
    handle = hook(conv)
    with pytest.raises(ValueError, match=r"'0' cannot be converted.*carries hooks"):
        convert(model, {"1": 2, "0": 2})
    assert type(model[1]) is nn.Conv2d
    if hasattr(handle, "remove"):
        handle.remove()  # type: ignore[attr-defined]
        convert(model, {"1": 2, "0": 2})
        assert isinstance(model[0], BasisConv2d)


def test_hooks_on_what_stays_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    model[0].bias.register_hook(lambda g: g * 0)
    convert(model, {"0": 2})
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert not bool(model[0].bias.grad.any())
    model[0].coeff.register_hook(lambda g: g)
    with pytest.raises(ValueError, match="Its coeff carries hooks on its gradient"):
        convert(model, {"0": 1.0})


def test_convert_refuses_to_lose_other_members() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    model[0].register_buffer("mask", torch.ones(6))
    model[0].add_module("adapter", nn.Linear(2, 2))
    conv = model[0]
    with pytest.raises(ValueError, match=r"members of its own \(adapter, mask\)"):
        convert(model, {"0": 2})
    assert model[0] is conv


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


ATTENTION = {
    "mask": lambda m: m.in_proj_weight.register_hook(lambda g: g),
    "bias": lambda m: m.in_proj_bias.register_post_accumulate_grad_hook(lambda p: None),
    "pruned": lambda m: prune.random_unstructured(m, "in_proj_weight", amount=0.5),
    "parametrized": lambda m: parametrize.register_parametrization(m, "in_proj_weight", Doubled()),
    "projection": lambda m: parametrizations.weight_norm(m.out_proj),
    "backward": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "state dict": lambda m: m.register_state_dict_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("make", ATTENTION.values(), ids=ATTENTION.keys())
def test_separate_attention_refuses_what_would_be_lost(make: Callable[..., object]) -> None:
    model = nn.Sequential(Attending(), Attending())
    make(model[1].attention)
    done = separate_attention(model)
    assert done.exchanged == ("0.attention",)
    assert "hooks" in done.skipped["1.attention"] or "computed" in done.skipped["1.attention"]


def test_hooks_on_the_projection_of_attention_stay() -> None:
    model = nn.Sequential(Attending())
    model[0].attention.out_proj.weight.register_hook(lambda g: g * 0)
    separate_attention(model)
    model(torch.randn(2, 3, 8)).square().sum().backward()
    assert not bool(model[0].attention.proj.weight.grad.any())
    assert bool(model[0].attention.q.weight.grad.any())


def test_what_is_shared_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    places = places_of(model)
    assert "same parameter is used at '0.weight' and '1.weight'" in str(obstacle(model[1], places))
    assert obstacle(model[2], places) is None


def test_an_error_takes_back_hooks_groups_state_and_other_objects() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    handle = model[0].register_forward_hook(lambda *_: None)
    driver = Attending()
    driver.reason = "before"
    state = copy.deepcopy(optimizer.state_dict())

    def broken() -> None:
        with undone_on_error(model, optimizer, driver):
            handle.remove()
            model[1].register_forward_hook(lambda *_: None)
            model.append(nn.Linear(2, 2))
            model[0].weight = nn.Parameter(torch.zeros(2, 2))
            optimizer.param_groups[0]["params"].append(model[2].weight)
            optimizer.param_groups[0]["lr"] = 7.0
            optimizer.state[model[2].weight]["momentum_buffer"] = torch.zeros(2, 2)
            optimizer.state[model[0].bias]["momentum_buffer"] = None
            driver.reason = "after"
            raise KeyboardInterrupt

    weight = model[0].weight
    with pytest.raises(KeyboardInterrupt):
        broken()
    assert len(model) == 2
    assert model[0].weight is weight
    assert len(model[0]._forward_hooks) == 1
    assert not model[1]._forward_hooks
    assert driver.reason == "before"
    assert str(optimizer.state_dict()) == str(state)
    handle.remove()
    assert not model[0]._forward_hooks


class Coded(Tensor):
    """As torchao's optimizers keep their states."""


@pytest.mark.parametrize(
    ("code", "kind"),
    [(lambda v: v.to(torch.uint8), "torch.uint8"), (lambda v: v.as_subclass(Coded), "Coded")],
    ids=["integers", "subclass"],
)
def test_states_in_a_code_of_their_own_are_not_cut(
    code: Callable[[Tensor], Tensor], kind: str
) -> None:
    """8-bit optimizers: as large as the parameter, and yet not its numbers."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    packed = model["attention"].in_proj_weight
    optimizer.state[packed]["exp_avg"] = code(optimizer.state[packed]["exp_avg"])
    with pytest.raises(ValueError, match=f"'exp_avg' as {kind}, in a code of its own, which canno"):
        separate_attention(model, optimizer)
    assert type(model["attention"]) is nn.MultiheadAttention
