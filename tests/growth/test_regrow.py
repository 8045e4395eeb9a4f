"""Sharded models (FSDP2, gloo) grow as the whole model does: parameters, Adam's state, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_surgeries import Network, batch, grown, inserted, network
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from training import on_ranks

from growkernels import distributed as gk_distributed
from growkernels.growth import insertions, rebuild

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def first_growth() -> list[dict[str, Any]]:
    model = network()
    inserted(model, None)
    return insertions(model)


def second_growth() -> list[dict[str, Any]]:
    model = network()
    inserted(model, None)
    before = len(insertions(model))
    grown(model)
    return insertions(model)[before:]


def build_on_meta() -> Network:
    with torch.device("meta"):
        return network().double()


def built() -> Network:
    model = network().double()
    model.convs[2].requires_grad_(False)
    return model


def shard(model: nn.Module) -> None:
    fully_shard(model.mlp)
    fully_shard(model)


def make_optimizer(model: nn.Module) -> Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def train(model: nn.Module, optimizer: Optimizer, rank: int, ranks: int) -> list[Tensor]:
    """The losses of this rank's part of a batch."""
    model.eval()  # a batch norm in training mode sees a part of the batch alone
    losses = []
    x, y = batch()
    x, y = torch.cat([x, x + 1])[:8].double(), torch.cat([y, y])[:8]
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def of_rank(rank: int) -> dict[str, Any]:
    ranks = torch.distributed.get_world_size()
    model: nn.Module = built()
    shard(model)
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3  # what a scheduler did
    losses = train(model, optimizer, rank, ranks)
    for records in (first_growth(), second_growth()):
        model, optimizer = gk_distributed.regrow(
            model,
            optimizer,
            records if rank == 0 else records[:0],
            build=build_on_meta,
            shard=shard,
            make_optimizer=make_optimizer,
        )
        losses += train(model, optimizer, rank, ranks)
    state = get_model_state_dict(model, options=FULL)
    of_optimizer = get_optimizer_state_dict(model, optimizer, options=FULL)
    local = {n: p.to_local() for n, p in model.named_parameters()}  # type: ignore[operator]
    return {
        "losses": losses,
        "model": state,
        "optimizer": of_optimizer,
        "records": insertions(model),
        "sharded": sum(p.numel() for p in local.values()),
        "refused": _refusals(rank) if ranks == 2 else {},
    }


def _refusals(rank: int) -> dict[str, str]:
    """What each rank is told; a rank that is told nothing would hang the others."""

    def told(model: nn.Module, records: Any = (), **changes: Any) -> str:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        callables: dict[str, Any] = {
            "build": build_on_meta,
            "shard": shard,
            "make_optimizer": make_optimizer,
            **changes,
        }
        try:
            gk_distributed.regrow(model, optimizer, list(records), **callables)
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
        return "nothing"

    parallel = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(parallel, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    sharded = built()
    shard(sharded)

    def build_with_buffer() -> nn.Module:
        model = build_on_meta()
        model.register_buffer("scale", torch.ones(1, device="meta"), persistent=False)
        return model

    def fails_on_the_last(model: nn.Module) -> None:
        if rank == 1:
            raise RuntimeError("no policy here")
        shard(model)

    return {
        "parallel": told(parallel),
        "wrapped": told(DistributedDataParallel(built())),
        "record": told(sharded, [{"kind": "neurons", "version": 1}]),
        "buffer": told(sharded, build=build_with_buffer),
        "shard": told(sharded, shard=fails_on_the_last),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(of_rank, tmp_path_factory.mktemp("ranks"), 4, 2)


@pytest.mark.parametrize("size", [2, 4])
def test_the_run_of_one_process_through_two_growths(
    results: list[dict[str, Any]], size: int
) -> None:
    ranks = results[:4] if size == 4 else results[4:]
    model: nn.Module = built()
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    losses = train(model, optimizer, 0, 1)
    rebuild(model, first_growth(), optimizer)
    losses += train(model, optimizer, 0, 1)
    rebuild(model, second_growth(), optimizer)
    losses += train(model, optimizer, 0, 1)
    means = torch.stack([torch.stack(result["losses"]) for result in ranks]).mean(0)
    torch.testing.assert_close(means, torch.stack(losses), rtol=1e-9, atol=1e-9)
    assert ranks[0]["records"] == insertions(model)
    assert all(result["records"] == ranks[0]["records"] for result in ranks)
    torch.testing.assert_close(
        dict(ranks[0]["model"]), dict(model.state_dict()), rtol=1e-6, atol=1e-8
    )
    alone = get_optimizer_state_dict(model, optimizer)
    for group, expected in zip(
        ranks[0]["optimizer"]["param_groups"], alone["param_groups"], strict=True
    ):
        assert sorted(group["params"]) == sorted(expected["params"])
        assert (group["lr"], group["weight_decay"]) == (5e-3, expected["weight_decay"])
    states = ranks[0]["optimizer"]["state"]
    assert states.keys() == alone["state"].keys()
    for name, state in alone["state"].items():
        torch.testing.assert_close(states[name], state, rtol=1e-6, atol=1e-9)
    steps = {float(state["step"]) for state in states.values()}
    assert steps == {12.0, 8.0, 4.0}
    whole = sum(p.numel() for p in model.parameters())
    assert sum(result["sharded"] for result in ranks) == whole


def test_refusals_reach_every_rank(results: list[dict[str, Any]]) -> None:
    for result in results[4:]:
        refused = result["refused"]
        assert "parts that are tensor parallel cannot grow" in refused["parallel"]
        assert "For DistributedDataParallel use" in refused["wrapped"]
        assert "Record 0 of the growth has no" in refused["record"]
        assert "Buffer 'scale' is on the meta device" in refused["buffer"]
        assert refused["shard"] == "no policy here"
