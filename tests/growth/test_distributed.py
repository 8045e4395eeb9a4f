"""Two processes (gloo) record different batches and take one decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import batches, mlp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from training import on_two_ranks, record

from growkernels.growth import LayerInsertion


def of_rank(rank: int) -> dict[str, Any]:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    try:
        LayerInsertion(wrapped)
    except TypeError as error:
        refusal = str(error)
    inserter = LayerInsertion(model)
    record(inserter, batches(model, 4, 6)[rank::2], wrapped)
    merits = inserter.merits()
    again = inserter.merits()
    assert torch.equal(again.values, merits.values)
    choice = inserter.select(merits)
    assert choice is not None
    inserter.insert(choice)
    wrapped = DistributedDataParallel(model)
    (x, y), *_ = batches(model, 1, 6, seed=rank)
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


def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    ranks = on_two_ranks(of_rank, tmp_path)
    model = mlp()
    inserter = LayerInsertion(model)
    record(inserter, batches(model, 4, 6))
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
