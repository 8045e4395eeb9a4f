"""Two processes record different batches and take one decision, that of one which sees them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from scaling_networks import batches, parameters, small_deit
from small_networks import batches as mlp_batches
from small_networks import mlp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from training import record

from growkernels.growth import LayerInsertion, NeuronScaling, insertions

BATCHES, BUDGET = 4, 900


def insertion(rank: int) -> dict[str, Any]:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    try:
        LayerInsertion(wrapped)
    except TypeError as error:
        refusal = str(error)
    inserter = LayerInsertion(model)
    record(inserter, mlp_batches(model, 4, 6)[rank::2], wrapped)
    merits = inserter.merits()
    again = inserter.merits()
    assert torch.equal(again.values, merits.values)
    choice = inserter.select(merits)
    assert choice is not None
    inserter.insert(choice)
    wrapped = DistributedDataParallel(model)
    (x, y), *_ = mlp_batches(model, 1, 6, seed=rank)
    F.cross_entropy(wrapped(x), y).backward()
    return {
        "values": merits.values,
        "snr": merits.snr,
        "base": merits.base,
        "batches": merits.batches,
        "choice": choice,
        "refusal": refusal,
        "grads": [p.grad for p in model.parameters()],
    }


def neurons(rank: int) -> dict[str, Any]:
    model = small_deit()
    scaling = NeuronScaling(
        model, widen=("fc1", "v"), generator=torch.Generator().manual_seed(10 + rank)
    )
    record(scaling, batches(model, BATCHES)[rank::2])
    scores = scaling.scores(tol=1e-6)
    chosen = scaling.select(scores, BUDGET, min_eligible=1)
    scaling.grow(chosen, init="eigenvector")
    random = NeuronScaling(model, "random", generator=torch.Generator().manual_seed(10 + rank))
    wrapped = DistributedDataParallel(model)
    (x, y), *_ = batches(model, 1, seed=rank)
    F.cross_entropy(wrapped(x), y).backward()
    return {
        "values": scores.values,
        "directions": scores.directions,
        "batches": scores.batches,
        "records": insertions(model),
        "size": parameters(model),
        "random": random.scores().values,
        "state": model.state_dict(),
        "grads": [p.grad for p in model.parameters()],
    }


def closed_forms(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for criterion in ("gradmax", "tiny"):
        model = small_deit()
        scaling = NeuronScaling(model, criterion, widen=("fc1",), depth=False)
        record(scaling, batches(model, BATCHES)[rank::2])
        scores = scaling.scores()
        chosen = scaling.select(scores, BUDGET, min_eligible=1)
        loss: Any = None
        if criterion == "tiny":  # each rank on its own data

            def loss(candidate: torch.nn.Module, model: torch.nn.Module = model) -> float:
                x, y = batches(model, BATCHES)[rank]
                return float(F.cross_entropy(candidate(x), y).detach())

        scaling.grow(chosen, init=criterion, loss=loss)
        found[criterion] = {
            "values": scores.values,
            "snr": scores.snr,
            "batches": scores.batches,
            "state": model.state_dict(),
        }
    return found


CHECKS = {check.__name__: check for check in (insertion, neurons, closed_forms)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return on_ranks(CHECKS, 2, tmp_path_factory.mktemp("scores"))


def test_all_ranks_insert_alike(found: dict[str, list[Any]]) -> None:
    ranks = found["insertion"]
    model = mlp()
    inserter = LayerInsertion(model)
    record(inserter, mlp_batches(model, 4, 6))
    alone = inserter.merits()
    for result in ranks:
        torch.testing.assert_close(result["values"], alone.values)
        torch.testing.assert_close(result["snr"], alone.snr)
        assert result["base"] == pytest.approx(alone.base)
        assert result["batches"] == 4
        assert result["choice"] == inserter.select(alone)
        assert "pass model.module" in result["refusal"]
    assert torch.equal(ranks[0]["values"], ranks[1]["values"])
    for a, b in zip(ranks[0]["grads"], ranks[1]["grads"], strict=True):
        assert torch.equal(a, b)


def test_all_ranks_grow_the_same_neurons(found: dict[str, list[Any]]) -> None:
    first, second = found["neurons"]
    model = small_deit()
    alone = NeuronScaling(model, widen=("fc1", "v"))
    record(alone, batches(model, BATCHES))
    scores = alone.scores(tol=1e-6)
    assert first["batches"] == scores.batches == BATCHES
    for layer, values in scores.values.items():
        torch.testing.assert_close(first["values"][layer], values, rtol=1e-6, atol=1e-9)
    chosen = alone.select(scores, BUDGET, min_eligible=1)
    assert first["size"] - parameters(model) == chosen.parameters
    assert first["records"][0]["depth"] == {k: list(v) for k, v in chosen.neurons.items()}
    assert first["records"] == second["records"]
    for table in ("values", "directions", "random", "state"):
        for name, values in first[table].items():
            assert torch.equal(values, second[table][name]), (table, name)
    for a, b in zip(first["grads"], second["grads"], strict=True):
        assert torch.equal(a, b)


def test_closed_forms_are_of_all_ranks_batches(found: dict[str, list[Any]]) -> None:
    first, second = found["closed_forms"]
    for criterion in ("gradmax", "tiny"):
        model = small_deit()
        alone = NeuronScaling(model, criterion, widen=("fc1",), depth=False)
        record(alone, batches(model, BATCHES))
        scores = alone.scores()
        one, other = first[criterion], second[criterion]
        assert one["batches"] == scores.batches == BATCHES
        for layer, values in scores.values.items():
            torch.testing.assert_close(one["values"][layer], values, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(one["snr"][layer], scores.snr[layer], rtol=1e-6, atol=0)
        for name, value in one["state"].items():
            assert torch.equal(value, other["state"][name]), (criterion, name)
