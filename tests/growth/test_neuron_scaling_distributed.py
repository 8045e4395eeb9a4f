"""Two processes (gloo) record different batches and grow the same neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from scaling_networks import batches, parameters, small_deit
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from training import on_two_ranks, record

from growkernels.growth import NeuronScaling, insertions

BATCHES, BUDGET = 4, 900


def of_rank(rank: int) -> dict[str, Any]:
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


def test_all_ranks_grow_the_same_neurons(tmp_path: Path) -> None:
    first, second = on_two_ranks(of_rank, tmp_path)
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


def closed_form_of_rank(rank: int) -> dict[str, Any]:
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


def test_closed_forms_are_of_all_ranks_batches(tmp_path: Path) -> None:
    first, second = on_two_ranks(closed_form_of_rank, tmp_path)
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
