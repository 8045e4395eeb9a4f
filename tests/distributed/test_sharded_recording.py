"""Recording on models that fully_shard has sharded: scores are those of the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks, raised
from small_networks import batches, cnn, mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

from growkernels.distributed import growing, regrow
from growkernels.growth import LayerInsertion, NeuronScaling, rebuild
from growkernels.nn import convert, separate_attention


def decided(model: nn.Module, data: Any) -> dict[str, Any]:
    inserter, scaling = LayerInsertion(model), NeuronScaling(model)
    magnitude = NeuronScaling(model, "magnitude")
    for x, y in data:
        with inserter.recording(), scaling.recording():
            F.cross_entropy(model(x), y).backward()
    merits = inserter.merits()
    scores = scaling.scores(tol=1e-9)
    chosen = scaling.select(scores, 21, min_eligible=1)  # those well below 0
    position = inserter.select(merits)
    assert position is not None
    return {
        "merits": merits.values,
        "base": merits.base,
        "scores": scores.values,
        "magnitude": magnitude.scores().values,
        "records": [inserter.record(position), scaling.record(chosen)],
        "refused": [
            raised(lambda: inserter.insert(position)),
            raised(lambda: scaling.grow(chosen)),
        ],
    }


def sharded(reshard: bool = True, **settings: Any) -> nn.Module:
    model = mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, reshard_after_forward=reshard, **settings)
    fully_shard(model, **settings)
    return model


def recordings(rank: int) -> list[dict[str, Any]]:
    data = batches(mlp(), 4, 6)[rank::2]
    told = []
    for model in (sharded(), sharded(reshard=False), fully_shard(mlp())):
        shapes = [type(p).__name__ for p in model.parameters()]
        told.append(decided(model, data))
        assert shapes == [type(p).__name__ for p in model.parameters()]
        assert isinstance(model, FSDPModule)
    return told


def in_bfloat16(rank: int) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    data = [(x.float(), y) for x, y in batches(mlp(), 4, 6)[rank::2]]
    model = mlp(dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    inserter = LayerInsertion(model)
    for x, y in data:
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
    merits = inserter.merits()
    return merits.values, merits.base


def tensor_parallel(rank: int) -> str:
    model = parallelize_module(mlp(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    return raised(lambda: LayerInsertion(model))


def fsdp1(rank: int) -> list[str]:
    model = FullyShardedDataParallel(mlp(), use_orig_params=True, device_id=torch.device("cpu"))

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters())

    def regrown() -> object:
        return regrow(
            model, optimizer(model), [], build=mlp, shard=lambda m: m, make_optimizer=optimizer
        )

    told = [
        lambda: LayerInsertion(model),
        lambda: LayerInsertion(model.module),
        lambda: NeuronScaling(model),
        lambda: convert(model, {}),
        lambda: growing(model).__enter__().driver,
        regrown,
    ]
    return [raised(surgery) for surgery in told]


def surgeries(rank: int) -> list[str]:
    """On a model that fully_shard has sharded."""
    model = fully_shard(cnn())
    scaling = NeuronScaling(model, "magnitude", kinds=["conv2d"])
    chosen = scaling.select(scaling.scores(), 1000, min_eligible=1)
    return [
        raised(lambda: convert(model, {"0.0": 1})),
        raised(lambda: separate_attention(model)),
        raised(lambda: rebuild(model, [])),
        raised(lambda: scaling.grow(chosen, init="eigenvector")),
    ]


CHECKS = {f.__name__: f for f in (recordings, in_bfloat16, tensor_parallel, fsdp1, surgeries)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return on_ranks(CHECKS, 2, tmp_path_factory.mktemp("sharded"))


def test_scores_are_those_of_the_plain_model(found: dict[str, list[Any]]) -> None:
    model = mlp()
    alone = decided(model, batches(model, 4, 6))
    for told in (told for of_rank in found["recordings"] for told in of_rank):
        torch.testing.assert_close(told["merits"], alone["merits"])
        assert told["base"] == pytest.approx(alone["base"])
        torch.testing.assert_close(told["scores"], alone["scores"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(told["magnitude"], alone["magnitude"])
        assert told["records"] == alone["records"]
        for sentence in told["refused"]:
            assert "distributed by FSDPModule" in sentence
            assert "gk.distributed.regrow" in sentence


def test_under_mixed_precision(found: dict[str, list[Any]]) -> None:
    model = mlp()
    alone = LayerInsertion(model)
    for x, y in batches(model, 4, 6):
        with alone.recording():
            F.cross_entropy(model(x), y).backward()
    merits = alone.merits()
    for values, base in found["in_bfloat16"]:
        atol = 0.1 * float(merits.values.max())
        torch.testing.assert_close(values.double(), merits.values, rtol=0, atol=atol)
        assert base == pytest.approx(merits.base, rel=0.1)


def test_what_is_sharded_is_not_edited(found: dict[str, list[Any]]) -> None:
    for sentence in (sentence for told in found["fsdp1"] for sentence in told):
        assert sentence.startswith("TypeError: ")
        assert " by FullyShardedDataParallel" in sentence or " in FullyShardedDataP" in sentence
    for sentence in (sentence for told in found["surgeries"] for sentence in told):
        assert sentence.startswith("TypeError: ")
        assert "distributed by FSDPModule" in sentence
        assert "gk.distributed.regrow" in sentence


def test_tensor_parallelism_is_refused(found: dict[str, list[Any]]) -> None:
    for sentence in found["tensor_parallel"]:
        assert sentence.startswith("TypeError: '0.weight' is a DTensor")
