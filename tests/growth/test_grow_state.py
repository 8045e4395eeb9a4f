"""States grow as live models do: the same bits, for every surgery and every optimizer."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from all_surgeries import SURGERIES, Network, batch, grown, inserter_at, network, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.optim import Optimizer
from training import check_equal

from growkernels.growth import NeuronScaling, grow_state, insertions, rebuild
from growkernels.nn import convert

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"momentum": 0.9}),
    "plain SGD": ("SGD", {}),
    "fused SGD": ("SGD", {"momentum": 0.9, "dampening": 0.5, "fused": True}),
    "Adam": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "Adadelta": ("Adadelta", {}),
    "Adafactor": ("Adafactor", {}),
    "Adamax": ("Adamax", {}),
    "ASGD": ("ASGD", {"t0": 2}),
    "Muon": ("Muon", {}),
    "NAdam": ("NAdam", {}),
    "RAdam": ("RAdam", {}),
    "RMSprop": ("RMSprop", {"momentum": 0.9, "centered": True}),
    "Rprop": ("Rprop", {}),
    "Adagrad": ("Adagrad", {}),
    "LBFGS": ("LBFGS", {"max_iter": 1}),
}
REFUSED = {
    "LBFGS": set(SURGERIES),
    "Adagrad": set(SURGERIES) - {"widen"},
    "Adafactor": {"widen", "separate attention"},
    "Muon": {"insert", "insert behind", "deepen", "pair"},
}


def optimizer_of(model: nn.Module, name: str) -> Optimizer:
    kind, options = OPTIMIZERS[name]
    parameters = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
    optimizer: Optimizer = getattr(torch.optim, kind)(parameters, **{"lr": 0.01, **options})
    return optimizer


def names_in_order(model: nn.Module, optimizer: Optimizer) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def by_names(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What get_optimizer_state_dict gives; that steps where there is no state yet."""
    names = names_in_order(model, optimizer)
    state = optimizer.state_dict()
    numbers = iter(names)
    return {
        "state": {names[i]: entries for i, entries in state["state"].items()},
        "param_groups": [
            {**group, "params": [next(numbers) for _ in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def build_on_meta() -> Network:
    with torch.device("meta"):
        return network()


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_the_live_surgery(name: str, surgery: str) -> None:
    model = network()
    optimizer = optimizer_of(model, name)
    train(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    order = names_in_order(model, optimizer)
    named = copy.deepcopy(by_names(model, optimizer))
    refused = surgery in REFUSED.get(name, ())
    if refused:
        copied = copy.deepcopy(model)
        SURGERIES[surgery](copied, None)
        records = insertions(copied)
        with pytest.raises((TypeError, ValueError), match="optimizer"):
            grow_state(records, *before, build=build_on_meta, parameter_names=order)
        return
    SURGERIES[surgery](model, optimizer)
    given = copy.deepcopy((before, named))
    model_state, optimizer_state = grow_state(
        insertions(model), *before, build=build_on_meta, parameter_names=order
    )
    check_equal(model_state, dict(model.state_dict()))
    check_equal(optimizer_state, optimizer.state_dict())
    _, with_names = grow_state(json.dumps(insertions(model)), before[0], named, build=build_on_meta)
    check_equal(with_names, by_names(model, optimizer))
    check_equal(given, (before, named))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_long_mixture(name: str) -> None:
    model = network()
    optimizer = optimizer_of(model, name)
    train(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    grown(model, optimizer)
    states = grow_state(insertions(model), *before, build=network)
    check_equal(states[0], dict(model.state_dict()))
    check_equal(states[1], optimizer.state_dict())
    # What was grown from the state trains as the live one does.
    twin = build_on_meta()
    rebuild(twin, insertions(model))
    twin.load_state_dict(states[0], assign=True)
    twin.head_again.weight = twin.head.weight
    other = optimizer_of(twin, name)
    assert states[1] is not None
    other.load_state_dict(copy.deepcopy(states[1]))
    assert train(twin, other) == train(model, optimizer)


@pytest.mark.parametrize("surgery", [*SURGERIES, "a long mixture"])
def test_states_of_several_optimizers(surgery: str) -> None:
    model = network()
    optimizers = [
        torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.01),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01),
    ]
    x, y = batch()
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    model_before = copy.deepcopy(model.state_dict())
    names = [names_in_order(model, optimizer) for optimizer in optimizers]
    numbered = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    named = copy.deepcopy([by_names(model, optimizer) for optimizer in optimizers])
    {**SURGERIES, "a long mixture": grown}[surgery](model, optimizers)  # type: ignore[arg-type]
    records = insertions(model)
    model_state, states = grow_state(records, model_before, named, build=build_on_meta)
    check_equal(model_state, dict(model.state_dict()))
    check_equal(states, [by_names(model, optimizer) for optimizer in optimizers])
    _, states = grow_state(
        records, model_before, numbered, build=build_on_meta, parameter_names=names
    )
    check_equal(states, [optimizer.state_dict() for optimizer in optimizers])
    with pytest.raises(ValueError, match="of 2 optimizers; pass parameter_names as a list"):
        grow_state(records, model_before, numbered, build=build_on_meta, parameter_names=names[:1])


def test_values_that_come_from_batches_are_in_the_record() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    scaling = NeuronScaling(model, layers=["mlp.0", "mlp.2"], form="gated", widen=("fc1",))
    x, y = batch()
    with scaling.recording():
        F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    chosen = scaling.select(scaling.scores(), budget=200, min_eligible=1)
    record = json.loads(json.dumps(scaling.record(chosen, init="eigenvector")))
    scaling.grow(chosen, init="eigenvector")
    scaling.close()
    state, nothing = grow_state(record, before, build=build_on_meta)
    assert nothing is None
    check_equal(state, dict(model.state_dict()))
    with pytest.raises(ValueError, match=r"take the record from scaling.record\(chosen"):
        grow_state(insertions(model), before, build=build_on_meta)
    old = {k: v for k, v in insertions(model)[0].items() if k not in ("init", "scale", "version")}
    with pytest.raises(ValueError, match="written by an earlier growkernels"):
        grow_state(old, before, build=build_on_meta)


def test_a_second_growth_of_a_state() -> None:
    model = network()
    optimizer = optimizer_of(model, "AdamW")
    train(model, optimizer)
    SURGERIES["insert"](model, optimizer)
    train(model, optimizer)
    history, before = insertions(model), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    inserter = inserter_at(model, "mlp.2", "linear_relu")
    record = inserter.record("mlp.2")
    inserter.insert("mlp.2", optimizer)

    def build() -> nn.Module:
        base = build_on_meta()
        rebuild(base, history)
        return base

    states = grow_state(record, *before, build=build)
    check_equal(states[0], dict(model.state_dict()))
    check_equal(states[1], optimizer.state_dict())


def test_no_phantom_step_between_a_growth_and_the_next_step() -> None:
    """Adam's new parameters begin at a count of 0 after a checkpoint by torch's own functions."""
    model = network()
    optimizer = optimizer_of(model, "AdamW")
    train(model, optimizer)
    SURGERIES["insert"](model, optimizer)
    options = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = network()
    rebuild(twin, insertions(model))
    twin.load_state_dict(model.state_dict())
    other = optimizer_of(twin, "AdamW")
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert train(twin, other, 5) == train(model, optimizer, 5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
    )
    train(model, optimizer, 1)
    record = convert(model, {"convs.0": 1}, record_only=True).record
    assert record is not None
    state, saved = model.state_dict(), optimizer.state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    smaller = {**state, "head.bias": torch.zeros(2)}
    named = by_names(model, optimizer)
    alien = {**named, "state": {**named["state"], "tail": {}}}
    bare = {"state": {}, "param_groups": [{"params": ["head.bias"], "lr": 0.1}]}
    for model_state, optimizer_state, message in (
        (wrapped, None, "The model's state lacks 'attending.attention.in_proj_bias'"),
        (smaller, None, r"'head.bias' has shape \(2,\) in the state and \(3,\)"),
        (state, saved, "has numbers for parameters, and several groups; pass parameter_names"),
        (state, alien, "is of a parameter 'tail', which the model"),
        (state, {"step": 1}, "has no 'state' and 'param_groups'"),
        (state, bare, r"cannot be told from its settings \(lr\); pass optimizer_type"),
    ):
        with pytest.raises(ValueError, match=message):
            grow_state(record, model_state, optimizer_state, build=build_on_meta)
    torch_named = torch.optim.AdamW(list(model.named_parameters()))
    train(model, torch_named, 1)
    before = copy.deepcopy((model.state_dict(), torch_named.state_dict()))
    convert(model, {"convs.0": 1}, torch_named)
    states = grow_state(record, *before, build=build_on_meta)
    check_equal(states[1], torch_named.state_dict())
