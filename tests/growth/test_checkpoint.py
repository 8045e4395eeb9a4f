"""Checkpoints for any number of processes: growth, states, settings and recorded batches."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from all_surgeries import Network, batch, grown, inserter_at, network, train
from small_networks import batches, mlp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer
from training import check_equal, on_ranks, record

from growkernels import checkpoint
from growkernels.growth import LayerInsertion, LossPlateau, NeuronScaling, insertions
from growkernels.nn import convert


def build_on_meta() -> Network:
    with torch.device("meta"):
        return network().double()


def make_optimizer(model: nn.Module) -> Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def shard(model: nn.Module) -> None:
    fully_shard(model.mlp)
    fully_shard(model)


def steps(model: nn.Module, optimizer: Optimizer, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    model.eval()
    x, y = batch()
    x, y = torch.cat([x, x + 1])[:8].double(), torch.cat([y, y])[:8]
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def drivers_of(model: nn.Module) -> tuple[LayerInsertion, NeuronScaling]:
    return LayerInsertion(model), NeuronScaling(model)


def numbers(drivers: tuple[LayerInsertion, NeuronScaling]) -> dict[str, Any]:
    merits = drivers[0].merits()
    return {"merits": merits.values, "n": merits.batches, "scores": drivers[1].scores().values}


def of_rank(folder: str, rank: int) -> dict[str, Any]:
    """Four processes save what two go on with; four go on with what one has saved."""
    ranks = torch.distributed.get_world_size()
    data = batches(mlp(), 8, 4)
    sharded, whole = Path(folder) / "sharded", Path(folder) / "whole"
    if ranks == 4:
        model: nn.Module = grown(network()).double()
        model.convs[2].requires_grad_(False)  # type: ignore[index, union-attr]
        shard(model)
        optimizer = make_optimizer(model)
        optimizer.param_groups[0]["lr"] = 3e-3
        steps(model, optimizer, rank, ranks)
        saving = checkpoint.save(sharded, model, optimizer, extra={"step": 3}, wait=False)
        assert saving is not None
        saving.result()
        torch.distributed.barrier()
        by_one = checkpoint.load(Path(folder) / "one", mlp)
        drivers = drivers_of(by_one.model)
        by_one.load_drivers(*drivers)
        for driver in drivers:
            record(driver, data[4:][rank::ranks])
        of_four = drivers_of(mlp())
        for driver in of_four:
            record(driver, data[:4][rank::ranks])
        checkpoint.save(whole, of_four[0].model, drivers=of_four)
    else:
        restored = checkpoint.load(sharded, build_on_meta, shard, make_optimizer)
        model, optimizer = restored.model, restored.optimizer
        assert restored.extra == {"step": 3}
        by_four = checkpoint.load(whole, mlp)
        drivers = drivers_of(by_four.model)
        by_four.load_drivers(*drivers)
        for driver in drivers:
            record(driver, data[4:][rank::ranks])
    return {"losses": steps(model, optimizer, rank, ranks), **numbers(drivers)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    drivers = drivers_of(mlp())
    for driver in drivers:
        record(driver, batches(mlp(), 8, 4)[:4])
    checkpoint.save(folder / "one", drivers[0].model, drivers=drivers)
    return folder, on_ranks(partial(of_rank, str(folder)), folder, 4, 2)


def test_four_two_and_one_go_on_alike(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = results
    restored = checkpoint.load(folder / "sharded", build_on_meta, None, make_optimizer)
    assert insertions(restored.model) == insertions(grown(network()))
    assert restored.optimizer.param_groups[0]["lr"] == 3e-3
    assert not restored.model.convs[2].basis.requires_grad  # type: ignore[index, union-attr]
    alone = torch.stack(steps(restored.model, restored.optimizer))
    for part in (ranks[:4], ranks[4:]):
        means = torch.stack([torch.stack(result["losses"]) for result in part]).mean(0)
        torch.testing.assert_close(means, alone, rtol=1e-9, atol=1e-9)


def test_recorded_batches_are_dealt_out(results: tuple[Path, list[dict[str, Any]]]) -> None:
    drivers = drivers_of(mlp())
    for driver in drivers:
        record(driver, batches(mlp(), 8, 4))
    expected = numbers(drivers)
    for result in results[1]:
        torch.testing.assert_close({k: result[k] for k in expected}, expected)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "NAdam"])
def test_one_process_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    def make(model: nn.Module) -> Optimizer:
        optimizer: Optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        return optimizer

    model: nn.Module = network()
    optimizer = make(model)
    train(model, optimizer)
    convert(model, {"convs.0": 1}, optimizer)
    inserter = inserter_at(model, "mlp.1", "linear_relu")
    plateau = LossPlateau(3)
    plateau.due(1, 0.5)
    checkpoint.save(tmp_path / "a", model, optimizer, [inserter, plateau])
    inserter.insert("mlp.1", optimizer)  # between a growth and the next step
    checkpoint.save(tmp_path / "b", model, optimizer)
    assert checkpoint.latest(tmp_path) == tmp_path / "b"
    restored = checkpoint.load(tmp_path / "b", network, None, make)
    check_equal(dict(restored.model.state_dict()), dict(model.state_dict()))
    check_equal(restored.optimizer.state_dict(), optimizer.state_dict())
    earlier = checkpoint.load(tmp_path / "a", network, None, make)
    again, other = LayerInsertion(earlier.model, {"mlp.1": "linear_relu"}), LossPlateau(3)
    earlier.load_drivers(again, other)
    assert other.state_dict() == plateau.state_dict()
    again.insert("mlp.1", earlier.optimizer)
    losses = train(model, optimizer)
    assert train(restored.model, restored.optimizer) == losses
    assert train(earlier.model, earlier.optimizer) == losses


def test_an_optimizer_that_has_not_stepped_stays_so(tmp_path: Path) -> None:
    model = network()
    optimizers = [
        torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01),
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.save(tmp_path / "a", model, optimizers)
    assert not any(optimizer.state for optimizer in optimizers)
    check_equal(dict(model.state_dict()), before)

    def make(model: nn.Module) -> list[Optimizer]:
        return [
            torch.optim.Muon([p for p in model.parameters() if p.dim() == 2]),
            torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2]),
        ]

    restored = checkpoint.load(tmp_path / "a", network, None, make)
    assert [o.param_groups[0]["lr"] for o in restored.optimizer] == [0.02, 0.01]
    assert not any(optimizer.state for optimizer in restored.optimizer)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = network()
    optimizer = make_optimizer(model)
    folder = tmp_path / "a"
    checkpoint.save(folder, model, optimizer)
    with pytest.raises(ValueError, match="holds a checkpoint; save each one into a folder of its"):
        checkpoint.save(folder, model)
    with pytest.raises(ValueError, match="holds a parameter of shape"):
        checkpoint.save(tmp_path / "b", network(), optimizer)
    with pytest.raises(ValueError, match=r"lacks '0\.bias', unlike"):
        checkpoint.load(folder, mlp)

    def one_group(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters())

    with pytest.raises(ValueError, match="a group whose parameters were not all in one group"):
        checkpoint.load(folder, network, None, one_group)
    with pytest.raises(ValueError, match="is of 0 drivers, not of 1"):
        checkpoint.load(folder, network).load_drivers(LossPlateau(3))
    unfinished = tmp_path / "c"
    shutil.copytree(folder, unfinished)
    (unfinished / ".metadata").unlink()
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        checkpoint.load(unfinished, network)
    assert checkpoint.latest(tmp_path) == folder
    assert json.dumps(insertions(model)) == "[]"
