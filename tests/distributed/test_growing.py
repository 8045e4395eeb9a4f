"""Growth under DistributedDataParallel: as in one process, and the same wrapper goes on."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks, raised
from small_networks import batches, cnn
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

import growkernels as gk
from growkernels.growth import LayerInsertion, NeuronScaling, insertions
from growkernels.nn import BasisConv2d, convert

Batches = list[tuple[Tensor, Tensor]]


def whole(data: Batches, rank: int, number: int) -> Batches:
    """This rank's part of every batch."""
    return [(x.chunk(number)[rank], y.chunk(number)[rank]) for x, y in data]


def train(called: nn.Module, optimizers: list[torch.optim.Optimizer], data: Batches) -> None:
    for x, y in data:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(called(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


def no_batch_norm() -> nn.Sequential:
    """Statistics of a part of a batch are not those of all of it."""
    model = cnn()
    model[0][4] = nn.Identity()
    return model


def grown_twice(rank: int, number: int) -> dict[str, Any]:
    model = no_batch_norm()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() <= 1]
    optimizers = [
        torch.optim.SGD(weights, lr=0.05, momentum=0.9),
        torch.optim.AdamW(biases, lr=0.01),
    ]
    called = DistributedDataParallel(model) if number > 1 else model
    data = whole(batches(model, 10, 8), rank, number)
    train(called, optimizers, data[:3])
    told: dict[str, Any] = {}
    with gk.distributed.growing(called, optimizers) as growth:
        for x, y in data[:4]:
            with growth.recording():
                F.cross_entropy(called(x), y).backward()
        told["merits"] = growth.driver.merits().values
        told["inserted"] = growth.insert_best(tau=1e-6)
    with gk.distributed.growing(called, optimizers) as growth:
        told["converted"] = list(growth.convert({"0.0": 2}).converted)
    train(called, optimizers, data[:3])
    scaling = NeuronScaling(model, kinds=("linear", "conv2d"))
    with gk.distributed.growing(called, optimizers, driver=scaling) as growth:
        for x, y in data[4:8]:
            with growth.recording():
                F.cross_entropy(called(x), y).backward()
        told["scores"] = scaling.scores(tol=1e-9).values
        told["grown"] = growth.grow_best(300, min_eligible=1, tol=1e-9).neurons
    scaling.close()
    for _ in range(2):
        train(called, optimizers, data)
    told["records"] = insertions(model)
    told["parameters"] = [p.detach() for p in model.parameters()]
    return told


SETTINGS: list[dict[str, Any]] = [
    {"bucket_cap_mb": 3},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
    {"broadcast_buffers": False},
]
ATTRIBUTES = (
    "process_group",
    "bucket_bytes_cap",
    "bucket_bytes_cap_default",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "broadcast_buffers",
    "device_ids",
    "dim",
)


def insert(called: DistributedDataParallel, rank: int) -> None:
    with gk.distributed.growing(called) as growth:
        for x, y in batches(called.module, 2, 4, seed=rank):
            with growth.recording():
                F.cross_entropy(called(x), y).backward()
        growth.insert_best()


def arguments(rank: int) -> list[dict[str, Any]]:
    told = []
    group = distributed.new_group([0, 1])
    for settings in SETTINGS:
        model = cnn()
        called = DistributedDataParallel(model, process_group=group, **settings)
        ran: list[int] = []
        called.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        called.note = "mine"
        before = {name: getattr(called, name) for name in ATTRIBUTES}
        (x, y), *_ = batches(model, 1, 4, seed=10 + rank)
        F.cross_entropy(called(x), y).backward()
        insert(called, rank)
        accumulated = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        called.zero_grad()
        count = len(ran)
        for _ in range(2):  # buckets are built anew in the second
            called.zero_grad()
            F.cross_entropy(called(x), y).backward()
        told.append(
            {
                "same": before == {name: getattr(called, name) for name in ATTRIBUTES},
                "hook": len(ran) == count + 2,
                "note": called.note,
                "grads": [p.grad for p in model.parameters()],
                "accumulated": accumulated,
                "layers": len(insertions(model)),
            }
        )
    return told


def communication_hooks(rank: int) -> dict[str, Any]:
    model = cnn()
    called = DistributedDataParallel(model)
    called.register_comm_hook(distributed.group.WORLD, default_hooks.allreduce_hook)
    insert(called, rank)
    (x, y), *_ = batches(model, 1, 4, seed=rank)
    F.cross_entropy(called(x), y).backward()
    kept = [hook is default_hooks.allreduce_hook for hook, _ in called._comm_hooks]
    grads = [p.grad for p in model.parameters()]
    model = cnn()
    other = DistributedDataParallel(model)
    state = powerSGD_hook.PowerSGDState(None)
    other.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    refused = raised(lambda: insert(other, rank))
    return {"kept": kept, "grads": grads, "refused": refused, "records": insertions(model)}


def mixed_precision(rank: int) -> dict[str, Any]:
    """Of DistributedDataParallel itself, whose passes need a GPU: what they would find."""
    precision = _MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    models = [no_batch_norm(), no_batch_norm()]
    grown = DistributedDataParallel(models[0], mixed_precision=precision)
    with gk.distributed.growing(grown) as growth:
        growth.convert({"0.0": 2})
    convert(models[1], {"0.0": 2})
    fresh = DistributedDataParallel(models[1], mixed_precision=precision)
    told = []
    for called in (grown, fresh):
        parameters = dict(called.module.named_parameters())
        modules = dict(called.module.named_modules())
        told.append(
            {
                "copies": {
                    n: (p._mp_param.dtype, p._mp_param.shape) for n, p in parameters.items()
                },
                "hooks": {n: len(m._forward_pre_hooks) for n, m in modules.items()},
                "upcasts": [type(state).__name__ for _, state in called._comm_hooks],
            }
        )
    return {"grown": told[0], "fresh": told[1], "same": grown.mixed_precision is precision}


def refusals(rank: int) -> list[str]:
    def told(called: nn.Module) -> str:
        before = [id(p) for p in called.parameters()]

        def grow() -> None:
            with gk.distributed.growing(called) as growth:
                growth.convert({"0.0": 2})

        sentence = raised(grow)
        assert [id(p) for p in called.parameters()] == before
        return sentence

    def wrapped(model: nn.Module, **settings: Any) -> DistributedDataParallel:
        return DistributedDataParallel(model, **settings)

    delayed = cnn()
    name, parameter = next(iter(delayed.named_parameters()))
    stepping = cnn()
    _apply_optimizer_in_backward(torch.optim.SGD, stepping.parameters(), {"lr": 0.1})
    with_hook = wrapped(cnn())
    with_hook._register_builtin_comm_hook(distributed.BuiltinCommHookType.ALLREDUCE)
    buffers = _MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    settings = {"param_to_hook_all_reduce": parameter, "process_group": distributed.group.WORLD}
    return [
        told(wrapped(delayed, delay_all_reduce_named_params=[(name, parameter)], **settings)),
        told(wrapped(stepping)),
        told(with_hook),
        told(wrapped(cnn(), mixed_precision=buffers)),
        told(torch.compile(wrapped(cnn()))),
    ]


def uneven_batches(rank: int) -> dict[str, Any]:
    model = no_batch_norm()
    called = DistributedDataParallel(model)
    data = batches(model, 5, 4)
    inserter = LayerInsertion(model)
    with gk.distributed.growing(called, driver=inserter) as growth:
        with called.join():
            for x, y in data[:4] if rank == 0 else data[4:]:
                with growth.recording():
                    F.cross_entropy(called(x), y).backward()
        merits = inserter.merits()
        inserter.reset()
        with called.no_sync():
            for x, y in data[rank::2][:2]:
                with growth.recording():
                    F.cross_entropy(called(x), y).backward()
        growth.insert_best()
    accumulated = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    F.cross_entropy(called(data[rank][0]), data[rank][1]).backward()
    return {
        "merits": merits.values,
        "batches": merits.batches,
        "accumulated": sum(grad is None for grad in accumulated),
        "grads": [p.grad for p in model.parameters()],
    }


def a_failed_recording(rank: int) -> dict[str, Any]:
    model = cnn()
    called = DistributedDataParallel(model)
    x, y = batches(model, 1, 4)[0]
    with gk.distributed.growing(called) as growth:
        with growth.recording():
            F.cross_entropy(called(x), y).backward()
        with growth.recording():
            loss = F.cross_entropy(called(x), y)
            loss.backward()
            if rank == 1:
                F.cross_entropy(model(x), y).backward()
        told = [raised(growth.insert_best)]
        changed = list(map(id, model.parameters()))

        def fails_here(network: nn.Module, _: Any) -> None:
            network[2] = nn.Linear(72, 3)
            if rank == 1:
                raise ValueError("Not here.")

        told.append(raised(lambda: growth.change(fails_here)))
        unchanged = list(map(id, model.parameters())) == changed
        model.zero_grad()
        F.cross_entropy(called(x), y).backward()  # as before
        growth.insert_best()
    return {"told": told, "unchanged": unchanged, "grads": [p.grad for p in model.parameters()][:2]}


CHECKS = {
    "grown_twice": partial(grown_twice, number=2),
    "arguments": arguments,
    "communication_hooks": communication_hooks,
    "mixed_precision": mixed_precision,
    "refusals": refusals,
    "uneven_batches": uneven_batches,
    "a_failed_recording": a_failed_recording,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return on_ranks(CHECKS, 2, tmp_path_factory.mktemp("growing"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    torch.set_num_threads(1)
    return grown_twice(0, 1)


def check_as_alone(told: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for result in told:
        for what in ("inserted", "grown", "converted", "records"):
            assert result[what] == alone[what]
        torch.testing.assert_close(result["merits"], alone["merits"])
        torch.testing.assert_close(result["scores"], alone["scores"], rtol=1e-5, atol=1e-8)
        for mine, first in zip(result["parameters"], told[0]["parameters"], strict=True):
            assert torch.equal(mine, first)
        for mine, other in zip(result["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
    assert alone["inserted"] is not None
    assert alone["grown"]
    assert alone["converted"] == ["0.0"]


def test_two_processes_grow_as_one(found: dict[str, list[Any]], alone: dict[str, Any]) -> None:
    check_as_alone(found["grown_twice"], alone)


def test_four_processes_grow_as_one(tmp_path_factory: Any, alone: dict[str, Any]) -> None:
    four = {"grown_twice": partial(grown_twice, number=4)}
    check_as_alone(on_ranks(four, 4, tmp_path_factory.mktemp("four"))["grown_twice"], alone)


def test_the_wrapper_keeps_its_arguments(found: dict[str, list[Any]]) -> None:
    for mine, other in zip(*found["arguments"], strict=True):
        for told in (mine, other):
            assert told["same"]
            assert told["hook"]
            assert told["note"] == "mine"
            assert told["layers"] == 1
            assert told["accumulated"]
        for one, two in zip(mine["grads"], other["grads"], strict=True):
            assert torch.equal(one, two)


def test_communication_hooks_are_kept_or_refused(found: dict[str, list[Any]]) -> None:
    mine, other = found["communication_hooks"]
    for told in (mine, other):
        assert told["kept"] == [True]
        assert "keeps a PowerSGDState" in told["refused"]
        assert told["records"] == []
    for one, two in zip(mine["grads"], other["grads"], strict=True):
        assert torch.equal(one, two)


def test_the_wrappers_mixed_precision_is_kept(found: dict[str, list[Any]]) -> None:
    for told in found["mixed_precision"]:
        assert told["same"]
        assert told["grown"] == told["fresh"]
        assert told["grown"]["upcasts"] == ["_AllreduceUpcastHookState"]
        assert {dtype for dtype, _ in told["grown"]["copies"].values()} == {torch.bfloat16}


def test_what_cannot_go_along_is_refused(found: dict[str, list[Any]]) -> None:
    mine, other = found["refusals"]
    assert mine == other
    for sentence, part in zip(
        mine,
        (
            "delays the reduction of some parameters",
            "optimizers that step in the backward pass",
            "The built-in communication hook",
            "mixed precision casts buffers",
            "The wrapper is compiled",
        ),
        strict=True,
    ):
        assert part in sentence


def test_ranks_may_record_different_numbers_of_batches(found: dict[str, list[Any]]) -> None:
    model = no_batch_norm()
    inserter = LayerInsertion(model)
    for x, y in batches(model, 5, 4):
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
    mine, other = found["uneven_batches"]
    for told in (mine, other):
        assert told["batches"] == 5
        torch.testing.assert_close(told["merits"], inserter.merits().values)
        assert told["accumulated"] == 2  # the new layer's weight and bias
    for one, two in zip(mine["grads"], other["grads"], strict=True):
        assert torch.equal(one, two)


def test_a_failure_on_one_rank_is_every_ranks(found: dict[str, list[Any]]) -> None:
    mine, other = found["a_failed_recording"]
    assert mine["told"] == other["told"]
    recording, surgery = mine["told"]
    assert recording.startswith("RuntimeError: On rank 1 of 2: Position")
    assert surgery == "ValueError: On rank 1 of 2: Not here."
    for told in (mine, other):
        assert told["unchanged"]
    for one, two in zip(mine["grads"], other["grads"], strict=True):
        assert torch.equal(one, two)


def test_one_process_needs_no_wrapper() -> None:
    model = cnn()
    with gk.distributed.growing(model, torch.optim.Adam(model.parameters())) as growth:
        for x, y in batches(model, 1, 4):
            with growth.recording():
                F.cross_entropy(model(x), y).backward()
        with pytest.raises(TypeError, match="needs growing"):
            growth.grow_best(100)
        assert growth.insert_best() is not None
        with pytest.raises(ValueError, match=r"call the driver's close\(\) first"):
            growth.convert({"0.0": 2})
    with gk.distributed.growing(model) as growth:
        growth.convert({"0.0": 2})
    assert any(isinstance(module, BasisConv2d) for module in model.modules())
    with (
        pytest.raises(ValueError, match="driver is of another model"),
        gk.distributed.growing(model, driver=LayerInsertion(cnn())),
    ):
        pass
