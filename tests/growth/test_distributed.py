"""Two processes (gloo) record different batches and take one decision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_networks import batches, mlp
from torch import distributed, multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from growkernels.growth import LayerInsertion


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = mlp()
    wrapped = DistributedDataParallel(model)
    try:
        LayerInsertion(wrapped)
    except TypeError as error:
        refusal = str(error)
    inserter = LayerInsertion(model)
    for x, y in batches(model, 4, 6)[rank::2]:
        with inserter.recording():
            F.cross_entropy(wrapped(x), y).backward()
    merits = inserter.merits()
    again = inserter.merits()
    assert torch.equal(again.values, merits.values)
    choice = inserter.select(merits)
    assert choice is not None
    inserter.insert(choice)
    wrapped = DistributedDataParallel(model)
    (x, y), *_ = batches(model, 1, 6, seed=rank)
    F.cross_entropy(wrapped(x), y).backward()
    result = {
        "values": merits.values,
        "snr": merits.snr,
        "base": merits.base,
        "batches": merits.batches,
        "choice": choice,
        "refusal": refusal,
        "grads": [p.grad for p in model.parameters()],
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    model = mlp()
    inserter = LayerInsertion(model)
    for x, y in batches(model, 4, 6):
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
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
