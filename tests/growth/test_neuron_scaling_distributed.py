"""Two processes (gloo) record different batches and grow the same neurons."""

from __future__ import annotations

from pathlib import Path

import torch
from scaling_networks import batches, parameters, record, small_deit
from torch import distributed, multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from growkernels.growth import NeuronScaling, insertions

BATCHES, BUDGET = 4, 900


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
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
    result = {
        "values": scores.values,
        "directions": scores.directions,
        "batches": scores.batches,
        "records": insertions(model),
        "size": parameters(model),
        "random": random.scores().values,
        "state": model.state_dict(),
        "grads": [p.grad for p in model.parameters()],
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_all_ranks_grow_the_same_neurons(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
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
