"""Checkpoints for any number of processes: growth, states, settings and recorded batches."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from all_surgeries import grown, inserter_at, network, train
from ranks import on_ranks, raised
from sharded_training import build_on_meta, muon_and_adamw, shard, train_on_part
from small_networks import batches, mlp
from torch import nn
from torch.optim import Optimizer
from training import adamw, check_equal, record

from growkernels import checkpoint
from growkernels.growth import LayerInsertion, LossPlateau, NeuronScaling, insertions
from growkernels.nn import convert


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
        optimizer = adamw(model)
        optimizer.param_groups[0]["lr"] = 3e-3
        train_on_part(model, optimizer, rank, ranks)
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
        restored = checkpoint.load(sharded, build_on_meta, shard, adamw)
        model, optimizer = restored.model, restored.optimizer
        assert restored.extra == {"step": 3}
        by_four = checkpoint.load(whole, mlp)
        drivers = drivers_of(by_four.model)
        by_four.load_drivers(*drivers)
        for driver in drivers:
            record(driver, data[4:][rank::ranks])
    return {"losses": train_on_part(model, optimizer, rank, ranks), **numbers(drivers)}


@contextmanager
def a_full_disk(here: bool) -> Iterator[None]:
    """No file of this process may become longer than 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failures(folder: Path, rank: int) -> dict[str, str]:
    """What each rank is told of what fails on one; and a save that goes well afterwards."""
    model = mlp()
    inserter = LayerInsertion(model)
    record(inserter, batches(model, 1, 4))
    (folder / "file").touch()
    (folder / "before").mkdir(exist_ok=True)
    told: dict[str, str] = {}

    def save(name: Path | str, wait: bool = True, extra: Any = None) -> None:
        saving = checkpoint.save(folder / name, model, drivers=[inserter], extra=extra, wait=wait)
        if saving is not None:
            saving.result()

    told["unwritable"] = raised(lambda: save("file/in" if rank == 1 else "unwritable"))
    with a_full_disk(rank == 2):
        told["full"] = raised(lambda: save("full"))
        told["full before"] = raised(lambda: save("before"))
        told["in the background"] = raised(lambda: save("background", wait=False))
    told["cannot be packed"] = raised(lambda: save("packed", extra=(lambda: 0) if rank else 1))
    torch.distributed.barrier()
    tried = ("unwritable", "full", "before", "background", "packed")
    told["left"] = str([p.name for name in tried for p in (folder / name).glob("*")])
    save("before")
    told["occupied"] = raised(lambda: save("before" if rank == 3 else "occupied"))
    told["missing"] = raised(lambda: checkpoint.load(folder / ("no" if rank == 3 else "one"), mlp))

    def make(model: nn.Module) -> Optimizer:
        if rank == 1:
            raise KeyError("lr")
        return adamw(model)

    told["optimizer"] = raised(lambda: checkpoint.load(folder / "before", mlp, None, make))
    return told


class Results(NamedTuple):
    """Of checkpoints in the folder, of four ranks and of two; and failures of four."""

    folder: Path
    ranks: list[dict[str, Any]]
    failures: list[dict[str, str]]


def test_what_fails_on_one_rank_fails_on_all(results: Results) -> None:
    first, *others = results.failures
    assert all(told == first for told in others)
    nothing = "was not written, and nothing is left of it"
    for name, rank, kind in (("unwritable", 1, "NotADirectoryError"), ("full", 2, "")):
        assert first[name].startswith(f"OSError: On rank {rank} of 4: The checkpoint in ")
        assert nothing in first[name]
        assert kind in first[name]
        assert "\n" not in first[name]
    for name in ("full before", "in the background"):
        assert "On rank 2 of 4: The checkpoint in " in first[name]
        assert nothing in first[name]
    assert first["cannot be packed"].startswith("RuntimeError: On rank 1 of 4: ")
    assert first["left"] == "[]"
    for name in ("unwritable", "full", "background", "packed", "occupied"):
        assert not (results.folder / name).exists()
    assert "On rank 3 of 4: " in first["occupied"]
    assert "holds a checkpoint; save each one" in first["occupied"]
    assert first["missing"].startswith("ValueError: On rank 3 of 4: ")
    assert first["optimizer"] == "RuntimeError: On rank 1 of 4: KeyError: 'lr'"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("checkpoints")
    drivers = drivers_of(mlp())
    for driver in drivers:
        record(driver, batches(mlp(), 8, 4)[:4])
    checkpoint.save(folder / "one", drivers[0].model, drivers=drivers)
    checks = {"checkpoints": partial(of_rank, str(folder))}
    told = on_ranks({**checks, "failures": partial(failures, folder)}, 4, folder)
    then = on_ranks(checks, 2, tmp_path_factory.mktemp("two"))
    return Results(folder, told["checkpoints"] + then["checkpoints"], told["failures"])


def test_four_two_and_one_go_on_alike(results: Results) -> None:
    folder, ranks, _ = results
    restored = checkpoint.load(folder / "sharded", build_on_meta, None, adamw)
    assert insertions(restored.model) == insertions(grown(network()))
    assert restored.optimizer.param_groups[0]["lr"] == 3e-3
    assert not restored.model.convs[2].basis.requires_grad  # type: ignore[index, union-attr]
    alone = torch.stack(train_on_part(restored.model, restored.optimizer))
    for part in (ranks[:4], ranks[4:]):
        means = torch.stack([torch.stack(result["losses"]) for result in part]).mean(0)
        torch.testing.assert_close(means, alone, rtol=1e-9, atol=1e-9)


def test_recorded_batches_are_dealt_out(results: Results) -> None:
    drivers = drivers_of(mlp())
    for driver in drivers:
        record(driver, batches(mlp(), 8, 4))
    expected = numbers(drivers)
    for result in results.ranks:
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
    optimizers = muon_and_adamw(model)
    optimizers[0].param_groups[0]["lr"] = 0.03
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.save(tmp_path / "a", model, optimizers)
    assert not any(optimizer.state for optimizer in optimizers)
    check_equal(dict(model.state_dict()), before)

    restored = checkpoint.load(tmp_path / "a", network, None, muon_and_adamw)
    assert [o.param_groups[0]["lr"] for o in restored.optimizer] == [0.03, 0.01]
    assert not any(optimizer.state for optimizer in restored.optimizer)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = network()
    optimizer = adamw(model)
    folder = tmp_path / "a"
    checkpoint.save(folder, model, optimizer)
    with pytest.raises(ValueError, match="holds a checkpoint; save each one into a folder of its"):
        checkpoint.save(folder, model)
    with pytest.raises(ValueError, match="holds a parameter of shape"):
        checkpoint.save(tmp_path / "b", network(), optimizer)
    with pytest.raises(ValueError, match=r"extra holds what torch\.load"):
        checkpoint.save(tmp_path / "b", model, extra={"path": tmp_path})
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
