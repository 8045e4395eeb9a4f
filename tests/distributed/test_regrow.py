"""Sharded models (FSDP2, gloo) grow as the whole model does: parameters, Adam's state, losses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from all_surgeries import Network, grown, inserted, network
from ranks import on_ranks
from sharded_training import build_on_meta, muon_and_adamw, shard, train_on_part
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import adamw

from growkernels import distributed as gk_distributed
from growkernels.growth import grow_state, insertions, rebuild

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


def built() -> Network:
    model = network().double()
    model.convs[2].requires_grad_(False)
    return model


def of_rank(rank: int) -> dict[str, Any]:
    ranks = torch.distributed.get_world_size()
    model: nn.Module = built()
    shard(model)
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3  # what a scheduler did
    losses = train_on_part(model, optimizer, rank, ranks, 4)
    for records in (first_growth(), second_growth()):
        model, optimizer = gk_distributed.regrow(
            model,
            optimizer,
            records if rank == 0 else records[:0],
            build=build_on_meta,
            shard=shard,
            make_optimizer=adamw,
        )
        losses += train_on_part(model, optimizer, rank, ranks, 4)
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
        "two optimizers": _two_optimizers(rank) if ranks == 2 else [],
    }


class Unused(nn.Module):
    """A network with a weight that no backward pass comes to."""

    def __init__(self, on_meta: bool) -> None:
        super().__init__()
        self.network = build_on_meta() if on_meta else built()
        self.unused = nn.Linear(2, 2, device="meta" if on_meta else "cpu", dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return y


def _two_optimizers(rank: int | None) -> list[Tensor]:
    """Losses through a growth; rank None: in one process."""
    model: nn.Module = Unused(on_meta=False)
    records = [{**r, "position": f"network.{r['position']}"} for r in first_growth()]
    if rank is None:
        optimizers = muon_and_adamw(model)
        losses = train_on_part(model, optimizers)
        rebuild(model, records, optimizers)
        return losses + train_on_part(model, optimizers)
    shard(model.network)  # type: ignore[arg-type]
    optimizers = muon_and_adamw(model)
    losses = train_on_part(model, optimizers, rank, 2)
    before = _full_states(model, optimizers)
    model, optimizers = gk_distributed.regrow(
        model,
        optimizers,
        records,
        build=partial(Unused, on_meta=True),
        shard=lambda new: shard(new.network),  # type: ignore[arg-type]
        make_optimizer=muon_and_adamw,
    )
    assert [type(part).__name__ for part in optimizers] == ["Muon", "AdamW"]
    assert not any(optimizers[0].state.get(model.unused.weight, {}))  # type: ignore[union-attr]
    after = _full_states(model, optimizers)
    if rank == 0:  # the others are given nothing
        expected = grow_state(records, *before, build=partial(Unused, on_meta=True))
        for state, grown_state in zip(after[1], expected[1], strict=True):
            assert state["state"].keys() == grown_state["state"].keys()
            torch.testing.assert_close(state["state"], grown_state["state"], rtol=0, atol=0)
    return losses + train_on_part(model, optimizers, rank, 2)


def _full_states(model: nn.Module, optimizers: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    states = [get_optimizer_state_dict(model, part, options=FULL) for part in optimizers]
    return get_model_state_dict(model, options=FULL), [dict(state) for state in states]


def _refusals(rank: int) -> dict[str, str]:
    """What each rank is told; a rank that is told nothing would hang the others."""

    def told(model: nn.Module, records: Any = (), **changes: Any) -> str:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        callables: dict[str, Any] = {
            "build": build_on_meta,
            "shard": shard,
            "make_optimizer": adamw,
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
        "fewer": told(sharded, make_optimizer=muon_and_adamw),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of four ranks, then of two."""
    checks = {"regrown": of_rank}
    return [
        result
        for ranks in (4, 2)
        for result in on_ranks(checks, ranks, tmp_path_factory.mktemp("ranks"))["regrown"]
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_the_run_of_one_process_through_two_growths(
    results: list[dict[str, Any]], size: int
) -> None:
    ranks = results[:4] if size == 4 else results[4:]
    model: nn.Module = built()
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    losses = train_on_part(model, optimizer, steps=4)
    rebuild(model, first_growth(), optimizer)
    losses += train_on_part(model, optimizer, steps=4)
    rebuild(model, second_growth(), optimizer)
    losses += train_on_part(model, optimizer, steps=4)
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
        assert refused["shard"] == "On rank 1 of 2: no policy here"
        assert "make_optimizer gives 2 optimizers, and 1 were given" in refused["fewer"]


def test_muon_and_adamw(results: list[dict[str, Any]]) -> None:
    """Their states are compared on the ranks, behind the growth; the losses show the rest."""
    means = torch.stack([torch.stack(result["two optimizers"]) for result in results[4:]]).mean(0)
    # Muon works in bfloat16.
    torch.testing.assert_close(means, torch.stack(_two_optimizers(None)), rtol=5e-3, atol=0)
