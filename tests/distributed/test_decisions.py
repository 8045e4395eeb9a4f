"""Four processes: whose decisions belong together, and what fails on one fails on all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import on_ranks, raised
from small_networks import batches, cnn, mlp
from torch import Tensor, distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from training import record

from growkernels.growth import BasisSearch, LayerInsertion, NeuronScaling
from growkernels.nn import convert

RANKS = 4


def own_group(rank: int) -> distributed.ProcessGroup:
    halves = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    return halves[rank // 2]


def decided(model: nn.Module, data: Any, called: nn.Module | None, **settings: Any) -> Any:
    inserter, scaling = LayerInsertion(model, **settings), NeuronScaling(model, **settings)
    record(inserter, data, called)
    record(scaling, data, called)
    return inserter.merits().values, scaling.scores(tol=1e-8).values


def models_in_subgroups(rank: int) -> dict[str, Any]:
    group = own_group(rank)
    model = mlp(seed=rank // 2)
    data = batches(model, 4, 6, seed=rank // 2)[rank % 2 :: 2]
    given = decided(model, data, None, group=group)
    found = decided(model, data, DistributedDataParallel(model, process_group=group))
    random = NeuronScaling(model, "random", group=group).scores().values
    other = LayerInsertion(mlp(), group=distributed.new_group([0]))
    return {"given": given, "found": found, "random": random, "other": raised(other.merits)}


def an_empty_rank(rank: int) -> list[str]:
    model = mlp()
    data = batches(model, 4, 6)[rank::4] if rank != 1 else []
    inserter, scaling = LayerInsertion(model), NeuronScaling(model)
    record(inserter, data)
    record(scaling, data)
    return [raised(inserter.merits), raised(scaling.scores)]


def an_infinite_gradient(rank: int) -> list[str]:
    model = mlp()
    inserter = LayerInsertion(model)
    with inserter.recording():
        (model(torch.randn(3, 2).double()).sum() * (torch.inf if rank == 3 else 1)).backward()
    return [raised(lambda: inserter.insert("1"))]


class OnlyHere(nn.Module):
    """Passes everything on, or raises."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises = raises

    def forward(self, x: Tensor) -> Tensor:
        if self.raises and not self.training:
            raise RuntimeError("This fails here alone.")
        return x


def a_failing_check(rank: int) -> dict[str, Any]:
    model = nn.Sequential(mlp(), OnlyHere(rank == 2))
    optimizer = torch.optim.Adam(model.parameters())
    inserter, scaling = LayerInsertion(model), NeuronScaling(model)
    data = batches(model, 4, 6)[rank::4]
    record(inserter, data)
    record(scaling, data)
    chosen = scaling.select(scaling.scores(), 100, min_eligible=1)
    before = [id(p) for p in model.parameters()]
    sample = data[0][0]
    told = [
        raised(lambda: inserter.insert("0.1", optimizer, sample=sample)),
        raised(lambda: scaling.grow(chosen, optimizer, sample=sample)),
    ]
    unchanged = [id(p) for p in model.parameters()] == before
    inserter.insert("0.1", optimizer)
    return {"told": told, "unchanged": unchanged, "layers": len(list(model.modules()))}


def other_positions(rank: int) -> list[str]:
    model = mlp()
    inserter = LayerInsertion(model)
    record(inserter, batches(model, 4, 6)[rank::4])
    position = "3" if rank == 1 else "1"
    return [raised(lambda: inserter.insert(position))]


def a_weight_without_gradient(rank: int) -> Any:
    model = mlp()
    model[2].weight.requires_grad_(rank != 0)
    inserter = LayerInsertion(model)
    record(inserter, batches(model, 4, 6)[rank::4])
    merits = inserter.merits()
    return merits.values, merits.base


def basis_search(rank: int) -> dict[str, Any]:
    model = cnn(dtype=torch.float64)
    search = BasisSearch(model, (0.25, 0.5, 0.75))
    taylor = search.sensitivities("taylor", batches=batches(model, 8, 4)[rank::4])
    trained = search.sensitivities("train", train=lambda network, _: float(rank))
    plans = [
        search.plan(taylor, ratio=0.8),
        search.plan(taylor, search.times(batches(model, 1, 2)[0][0], rounds=1), max_cost=1e9),
    ]
    empty = raised(
        lambda: search.sensitivities("taylor", batches=batches(model, int(rank != 3), 4))
    )
    return {
        "taylor": (taylor.costs, taylor.errors, taylor.baseline),
        "train": (trained.costs, trained.baseline),
        "plans": [dict(plan) for plan in plans],
        "empty": empty,
    }


def an_old_wrapper(rank: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    model = cnn()
    wrapped = DistributedDataParallel(model)
    (x, y), *_ = batches(model, 1, 2, seed=rank)
    inserter = LayerInsertion(model)
    record(inserter, [(x, y)])
    told["failed"] = raised(lambda: inserter.insert("nowhere"))
    wrapped(x)  # nothing has changed
    inserter.insert("0.1")
    told["inserted"] = raised(lambda: wrapped(x))
    inserter.close()
    told["again"] = raised(lambda: wrapped(x))
    wrapped = DistributedDataParallel(model)
    F.cross_entropy(wrapped(x), y).backward()
    told["grads"] = [p.grad for p in model.parameters()]
    convert(model, {"0.0": 1})
    told["converted"] = raised(lambda: wrapped(x))
    other = DistributedDataParallel(mlp())
    other(torch.zeros(1, 2).double())  # of another model
    return told


def zero_redundancy(rank: int) -> dict[str, Any]:
    model = cnn()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)
    inserter, scaling = LayerInsertion(model), NeuronScaling(model, "magnitude", kinds=["conv2d"])
    record(inserter, batches(model, 1, 2))
    chosen = scaling.select(scaling.scores(), 1000, min_eligible=1)
    before = copy.deepcopy([repr(model), len(optimizer.param_groups[0]["params"])])
    told = [
        raised(lambda: inserter.insert("0.1", optimizer)),
        raised(lambda: scaling.grow(chosen, optimizer)),
    ]
    inserter.close()
    scaling.close()
    told.append(raised(lambda: convert(model, {"0.0": 1}, optimizer)))
    after = [repr(model), len(optimizer.param_groups[0]["params"])]
    return {"told": told, "unchanged": before == after}


CHECKS = {
    check.__name__: check
    for check in (
        models_in_subgroups,
        an_empty_rank,
        an_infinite_gradient,
        a_failing_check,
        other_positions,
        a_weight_without_gradient,
        basis_search,
        an_old_wrapper,
        zero_redundancy,
    )
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return on_ranks(CHECKS, RANKS, tmp_path_factory.mktemp("decisions"))


def same(told: list[Any]) -> Any:
    """What all ranks found."""
    assert all(other == told[0] for other in told), told
    return told[0]


def test_models_in_subgroups_keep_to_themselves(found: dict[str, list[Any]]) -> None:
    told = found["models_in_subgroups"]
    for half in (0, 1):
        model = mlp(seed=half)
        values, scores = decided(model, batches(model, 4, 6, seed=half), None)
        for rank in (2 * half, 2 * half + 1):
            for how in ("given", "found"):
                torch.testing.assert_close(told[rank][how][0], values)
                torch.testing.assert_close(told[rank][how][1], scores, rtol=1e-6, atol=1e-9)
        for name, numbers in told[2 * half]["random"].items():
            assert torch.equal(numbers, told[2 * half + 1]["random"][name])
    assert "not in the given group" in same([result["other"] for result in told[1:]])


def test_an_empty_rank_is_every_ranks_error(found: dict[str, list[Any]]) -> None:
    for sentence in same(found["an_empty_rank"]):
        assert sentence.startswith("RuntimeError: On rank 1 of 4: No batches are recorded")


def test_a_check_that_fails_on_one_rank_fails_on_all(found: dict[str, list[Any]]) -> None:
    told = found["a_failing_check"]
    for sentence in same([result["told"] for result in told]):
        assert sentence == "RuntimeError: On rank 2 of 4: This fails here alone."
    assert all(result["unchanged"] for result in told)
    same([result["layers"] for result in told])
    (sentence,) = same(found["an_infinite_gradient"])
    assert sentence.startswith("ValueError: On rank 3 of 4: The gradient recorded at '1' is NaN")


def test_ranks_that_would_insert_elsewhere(found: dict[str, list[Any]]) -> None:
    (sentence,) = same(found["other_positions"])
    assert "insert a layer behind '1', and rank 1 to insert a layer behind '3'" in sentence


def test_a_weight_that_one_rank_has_no_gradient_of(found: dict[str, list[Any]]) -> None:
    first, *others = found["a_weight_without_gradient"]
    for values, base in others:
        assert torch.equal(values, first[0])
        assert base == first[1]


def test_a_search_over_ranks_is_one_search(found: dict[str, list[Any]]) -> None:
    told = found["basis_search"]
    costs, errors, baseline = same([result["taylor"] for result in told])
    model = cnn(dtype=torch.float64)
    search = BasisSearch(model, (0.25, 0.5, 0.75))
    alone = search.sensitivities("taylor", batches=batches(model, 8, 4), draws=64)
    assert baseline == pytest.approx(alone.baseline)
    for path, ranks in alone.costs.items():
        for rank, cost in ranks.items():
            assert abs(costs[path][rank] - cost) < 8 * errors[path][rank]
    trained, quality = same([result["train"] for result in told])
    assert quality == 1.5
    assert all(cost == 0 for ranks in trained.values() for cost in ranks.values())
    same([result["plans"] for result in told])
    assert "On rank 3 of 4: There are no calibration" in same([r["empty"] for r in told])


def test_a_wrapper_that_an_insertion_left_behind(found: dict[str, list[Any]]) -> None:
    for told in found["an_old_wrapper"]:
        assert "not a candidate position" in told["failed"]
        for when in ("inserted", "again", "converted"):
            assert "wrap the module again" in told[when]
        for mine, first in zip(told["grads"], found["an_old_wrapper"][0]["grads"], strict=True):
            assert torch.equal(mine, first)


def test_an_optimizer_that_shards_its_state_is_refused(found: dict[str, list[Any]]) -> None:
    for told in found["zero_redundancy"]:
        assert told["unchanged"]
        for sentence in told["told"]:
            assert "ZeroRedundancyOptimizer wraps an optimizer" in sentence
