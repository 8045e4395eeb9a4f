"""A search's costs, times and plans follow the layers of the model across changes by others."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from growkernels.growth import BasisSearch, LayerInsertion, LayerTimes, Sensitivities
from growkernels.nn import BasisConv2d, convert


def net() -> nn.Sequential:
    """Convolutions of one size, so that nothing but identity tells them apart."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        convs[0],
        convs[1],
        nn.ReLU(),
        convs[2],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 5, 5, generator=generator), torch.arange(6) % 3


def insert(model: nn.Module) -> None:
    inserter = LayerInsertion(model)
    x, y = batch()
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    inserter.insert("1")
    inserter.close()


def distinct(search: BasisSearch) -> tuple[Sensitivities, LayerTimes]:
    """Costs and times that differ from layer to layer, as of a search and a measurement."""
    found = search.sensitivities("taylor", batches=[batch()], draws=1)
    costs = {
        path: dict.fromkeys(ranks, 4.0 - place)
        for place, (path, ranks) in enumerate(found.costs.items())
    }
    object.__setattr__(found, "costs", costs)
    times = search.times(batch()[0], rounds=1)
    basis = {
        path: dict.fromkeys(ranks, 1.0 - 0.1 * place)
        for place, (path, ranks) in enumerate(times.basis.items())
    }
    object.__setattr__(times, "basis", basis)
    object.__setattr__(times, "full", dict.fromkeys(times.full, 2.0))
    object.__setattr__(times, "step", 10.0)
    return found, times


def test_a_plan_is_carried_out_on_the_layers_it_was_made_for() -> None:
    model = net()
    planned = model[3]
    search = BasisSearch(model, (0.25,), ["3"])
    plan = search.plan(search.sensitivities("taylor", batches=[batch()]), max_cost=1e9)
    assert plan == {"3": 2}
    insert(model)
    done = convert(model, plan)
    assert list(done.converted) == ["4"]
    assert isinstance(model[4], BasisConv2d)
    assert isinstance(model[3], nn.Conv2d)
    assert planned not in list(model.modules())


def test_costs_and_times_from_before_and_after_fit_together() -> None:
    model = net()
    search = BasisSearch(model, (0.25,))
    costs, times = distinct(search)
    plans = [search.plan(costs, times, ratio=0.85), search.plan(costs, ratio=0.9)]
    predicted = [(costs.cost_of(plan), times.step_of(plan)) for plan in plans]
    insert(model)
    assert search.candidates == {"0": (2,), "3": (2,), "4": (2,), "6": (2,)}
    again = [search.plan(costs, times, ratio=0.85), search.plan(costs, ratio=0.9)]
    moved = {"0": "0", "2": "3", "3": "4", "5": "6"}
    for before, after, numbers in zip(plans, again, predicted, strict=True):
        assert after == {moved[path]: rank for path, rank in before.items()}
        assert (costs.cost_of(after), times.step_of(after)) == numbers
        assert (costs.cost_of(before), times.step_of(before)) == numbers
    new_costs, new_times = distinct(search)
    assert set(new_costs.costs) == set(new_times.full) == set(search.candidates)
    assert search.plan(new_costs, times, ratio=0.85) == again[0]
    assert search.plan(costs, new_times, ratio=0.85) == again[0]


def test_a_replaced_layer_is_named() -> None:
    model = net()
    search = BasisSearch(model, (0.25,))
    costs, times = distinct(search)
    plan = search.plan(costs, times, ratio=0.85)
    model[3] = copy.deepcopy(model[3])
    for use in (
        lambda: search.plan(costs, ratio=0.9),
        lambda: search.times(batch()[0]),
        lambda: search.sensitivities("taylor", batches=[batch()]),
    ):
        with pytest.raises(RuntimeError, match="Layer '3' of the search is not in the model any"):
            use()
    assert set(search.candidates) == {"0", "2", "3", "5"}
    convert(model, plan)  # the place is the same


def test_a_plan_whose_layer_is_gone_from_a_renumbered_model() -> None:
    model = net()
    search = BasisSearch(model, (0.25,), ["3"])
    plan = search.plan(search.sensitivities("taylor", batches=[batch()]), max_cost=1e9)
    del model[3]
    model.insert(2, nn.Conv2d(8, 8, 3, padding=1))
    before = list(model)
    with pytest.raises(ValueError, match="'3', where the model has another layer than it was made"):
        convert(model, plan)
    assert list(model) == before


def test_plans_are_plain_elsewhere() -> None:
    model = net()
    search = BasisSearch(model, (0.25,), ["3"])
    plan = search.plan(search.sensitivities("taylor", batches=[batch()]), max_cost=1e9)
    assert json.loads(json.dumps(plan)) == plan == {"3": 2}
    assert pickle.loads(pickle.dumps(plan)) == plan
    other = net()
    assert list(convert(other, plan).converted) == ["3"]
    assert list(convert(model, plan).converted) == ["3"]
    assert convert(model, plan).skipped == {"3": "already a basis convolution with 2 filters"}, (
        "the plan is of that place"
    )


def test_short_trainings_of_a_model_that_is_built_otherwise() -> None:
    model = net()
    search = BasisSearch(model, (0.25,), ["3"])

    def train(model: nn.Module, generator: torch.Generator) -> float:
        return 0.0

    search.sensitivities("train", train=train, build=lambda _: net())
    insert(model)
    costs = search.sensitivities("train", train=train)
    assert set(costs.costs) == {"4"}
    with pytest.raises(ValueError, match=r"build\(\) returned a model with other convolutions"):
        search.sensitivities("train", train=train, build=lambda _: net())


def pruned(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[2], "weight", amount=0.5)  # type: ignore[no-untyped-call]


def with_old_weight_norm(model: nn.Sequential) -> None:
    weight_norm(model[2])


def with_weight_norm(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[2])  # type: ignore[no-untyped-call]


def with_a_kept_activation(model: nn.Sequential) -> None:
    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        module.last = output  # type: ignore[assignment]

    model[2].register_forward_hook(keep)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "change", [pruned, with_old_weight_norm, with_weight_norm, with_a_kept_activation]
)
def test_a_search_beside_computed_weights(change: object) -> None:
    model = net()
    assert callable(change)
    change(model)
    x, y = batch()
    expected = model(x)
    search = BasisSearch(model, (0.25,), ["5"])
    costs = search.sensitivities("taylor", batches=[(x, y)], draws=1)
    search.times(x, rounds=1)
    search.sensitivities("train", train=lambda trained, _: float(trained(x).sum()))
    assert torch.equal(model(x), expected)
    convert(model, search.plan(costs, max_cost=1e9))
    assert isinstance(model[5], BasisConv2d)
