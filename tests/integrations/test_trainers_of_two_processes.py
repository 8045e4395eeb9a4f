"""Growth inside trainers under DistributedDataParallel, and through Accelerate's wrappers."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.nn import functional as F

import growkernels as gk
from growkernels.growth import FixedStep, LayerInsertion, NeuronScaling, insertions

NEEDED = ("lightning", "transformers", "accelerate")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    pytest.skip(f"needs {', '.join(NEEDED)}", allow_module_level=True)


def as_torchrun_does(rank: int) -> None:
    """What trainers read to know that they are one of several."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        MASTER_ADDR="localhost",
        MASTER_PORT="0",  # they have met already
        TORCHELASTIC_RUN_ID="none",
    )


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def in_lightning(rank: int) -> dict[str, Any]:
    from lightning_networks import ROWS, Classifier, loader, trainer

    from growkernels.integrations.lightning import Grow

    as_torchrun_does(rank)
    grow = Grow(FixedStep([2, 4]), module="net")
    model = Classifier()
    with tempfile.TemporaryDirectory() as folder:
        running = trainer(
            folder, [grow], 6, devices=2, strategy="ddp", use_distributed_sampler=True
        )
        running.fit(model, loader(ROWS // 2))
    return {
        "grown": grow.grown,
        "records": insertions(model.net),
        "parameters": parameters(model),
    }


def in_transformers(rank: int) -> dict[str, Any]:
    from test_transformers import fit, growth, vit

    as_torchrun_does(rank)
    model = vit()
    grow = growth(module="vit")
    with tempfile.TemporaryDirectory() as folder:
        fit(model, grow, folder, steps=7, ddp_backend="gloo")  # type: ignore[arg-type]
    return {
        "grown": grow.grown,
        "records": insertions(model.vit),
        "parameters": parameters(model),
    }


def through_accelerate(rank: int) -> dict[str, Any]:
    from accelerate import Accelerator
    from small_networks import batches, cnn

    as_torchrun_does(rank)
    accelerator = Accelerator(cpu=True)
    model = cnn()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(model, sgd)
    data = batches(model, 6, 4, seed=rank)

    def train() -> None:
        for x, y in data[:3]:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(wrapped(x), y))
            optimizer.step()

    train()
    scaling = NeuronScaling(model, kinds=("conv2d", "linear"))
    with gk.distributed.growing(wrapped, optimizer, driver=scaling) as growth:
        for x, y in data[3:]:
            with growth.recording():
                accelerator.backward(F.cross_entropy(wrapped(x), y))
        chosen = growth.grow_best(200, min_eligible=1)
    scaling.close()
    train()
    converted = growth.convert({"0.3": 2}) if "0.3" not in chosen.neurons else None
    train()
    held = {id(p) for group in sgd.param_groups for p in group["params"]}
    return {
        "gain": insertions(model)[0]["gain"],
        "converted": converted is not None,
        "held": held == {id(p) for p in model.parameters()},
        "momentum": all("momentum_buffer" in sgd.state[p] for p in model.parameters()),
        "models": len(accelerator._models),
        "parameters": parameters(model),
    }


CHECKS = {f.__name__: f for f in (in_lightning, in_transformers, through_accelerate)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return on_ranks(CHECKS, 2, tmp_path_factory.mktemp("trainers"))


def check_same(mine: dict[str, Any], other: dict[str, Any]) -> None:
    for one, two in zip(mine["parameters"], other["parameters"], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("trainer", ["in_lightning", "in_transformers"])
def test_ranks_grow_alike(found: dict[str, list[Any]], trainer: str) -> None:
    mine, other = found[trainer]
    assert mine["records"] == other["records"]
    assert len(mine["records"]) == 2
    assert mine["grown"] == other["grown"]
    check_same(mine, other)


def test_accelerates_optimizer_is_seen_through(found: dict[str, list[Any]]) -> None:
    mine, other = found["through_accelerate"]
    for told in (mine, other):
        assert told["gain"] == pytest.approx(2**0.5)  # of SGD, and not of its wrapper
        assert told["held"]
        assert told["momentum"]
        assert told["models"] == 1
    check_same(mine, other)


def test_one_process_through_accelerate() -> None:
    from accelerate import Accelerator
    from small_networks import batches, mlp

    model = mlp()
    plain = torch.optim.Adam(model.parameters())
    optimizer = Accelerator(cpu=True).prepare(plain)
    assert optimizer is not plain
    inserter = LayerInsertion(model)
    x, y = batches(model, 1, 4)[0]
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    inserter.insert("1", optimizer)
    optimizer.step()
    assert all(p in plain.state for p in model.parameters() if p.grad is not None)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
