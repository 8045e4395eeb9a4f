"""Growing a model that ``fully_shard`` has sharded: through full states into a new model.

``fully_shard`` cannot be undone or applied twice, and parameters that come after it belong to no
group that reduces their gradients. So the states are gathered on the first rank, grow there as
plain dicts (``gk.growth.grow_state``), and go to a new model, sharded by the same policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from growkernels.growth import grow_state, insertions, rebuild
from growkernels.growth.records import Records, read_records
from growkernels.growth.state import shared_parameters_kept
from growkernels.nn.grown_layers import Branch

Outcome = Mapping[str, Any]


def regrow(
    model: nn.Module,
    optimizer: Optimizer,
    records: Records,
    *,
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], object],
    make_optimizer: Callable[[nn.Module], Optimizer],
) -> tuple[nn.Module, Optimizer]:
    """A grown model in place of one that is sharded by ``fully_shard`` (FSDP2), with its optimizer.

    ::

        record = inserter.record(position)
        model, optimizer = gk.distributed.regrow(
            model, optimizer, [record], build=build_on_meta, shard=shard, make_optimizer=make
        )

    Every rank calls it; the records are the first rank's. Parameters and the optimizer's state are
    those that the live surgery leaves in one process, and parameters without a state begin anew,
    not at a step count of 1. Mixed precision, offloading and resharding are those of ``shard``.
    Model and optimizer that were given stay as they are; drop them, and build schedulers, drivers
    and compiled modules anew.

    **Memory.** On the first rank's CPU the full parameters and optimizer state, once (three times
    the parameters under Adam), what grows of them twice; on its device and on those of all others
    their shards of the old and of the new model, and one full tensor of each at a time.

    Args:
        model: sharded, or whole on every rank.
        optimizer: the model's.
        records: what to do, see ``gk.growth.grow_state``.
        build: gives the base model, before any growth, best on the meta device; what
            ``gk.growth.insertions(model)`` says is rebuilt in it.
        shard: applies ``fully_shard`` to a model, as it was applied to this one.
        make_optimizer: gives the optimizer of a sharded model; learning rates and the other
            settings of groups are those of the optimizer that was given.

    Raises:
        TypeError: a wrapped model, or one with parts that are tensor parallel.
        ValueError: what ``grow_state`` raises, on every rank; a mesh that is not of all ranks; a
            buffer that is in no state and that ``build`` leaves on the meta device.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; regrow takes one torch.optim optimizer of "
            "the whole model."
        )
    _check_sharding(model)
    history = insertions(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state = get_model_state_dict(model, options=options)
    optimizer_state = state_by_names(model, optimizer, options)

    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}

    def build_before() -> nn.Module:
        base = build()
        rebuild(base, history)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return base

    def grow() -> Outcome:
        listed = read_records(records)
        states = grow_state(
            listed,
            model_state,
            optimizer_state,
            build=build_before,
            optimizer_type=type(optimizer),
        )
        assert states[1] is not None
        with_state = list(states[1]["state"])
        return {"records": listed, "with_state": with_state, "states": states}

    grown = _of_first_rank(grow)
    model_state, optimizer_state = grown.get("states", ({}, {}))

    def build_after() -> nn.Module:
        new = build_before()
        rebuild(new, grown["records"])
        new = _sharded(new, shard)
        give_memory(new, _device_of(model))
        return new

    new = on_all_ranks(build_after)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(new, model_state, options=options)
    new.train(model.training)
    new_optimizer = on_all_ranks(lambda: make_optimizer(new))
    set_optimizer_state_dict(new, new_optimizer, optimizer_state, options=options)
    keep_states(new, new_optimizer, grown["with_state"])
    return new, new_optimizer


def state_by_names(
    model: nn.Module, optimizer: Optimizer, options: StateDictOptions
) -> dict[str, Any]:
    """``get_optimizer_state_dict``, but for its step with an optimizer that has made none yet."""
    if any(optimizer.state.values()):
        return dict(get_optimizer_state_dict(model, optimizer, options=options))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": {}, "param_groups": groups}


def keep_states(model: nn.Module, optimizer: Optimizer, with_state: list[str]) -> None:
    """Drop the states that torch made for parameters whose state was not given.

    It makes them by a step with a learning rate and gradients of 0, whose count stays.
    """
    kept = set(with_state)
    for name, parameter in model.named_parameters():
        if name not in kept:
            optimizer.state.pop(parameter, None)


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory on this device for what is on the meta device, to be filled with a state."""
    if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta and not isinstance(module, Branch):
                raise ValueError(
                    f"Buffer {f'{path}.{name}' if path else name!r} is on the meta device and in "
                    "no state dict, so its values would be lost; let build() or shard() give it "
                    "values, or build on the CPU."
                )
    with shared_parameters_kept(model):
        model.to_empty(device=device)


def _sharded(model: nn.Module, shard: Callable[[nn.Module], object]) -> nn.Module:
    given = shard(model)
    return given if isinstance(given, nn.Module) else model


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _check_sharding(model: nn.Module) -> None:
    """Raise TypeError unless a model is sharded by `fully_shard` alone, or whole."""
    wrappers = (DistributedDataParallel, DataParallel, FullyShardedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            raise TypeError(
                f"{f'Module {name!r}' if name else 'The model'} is wrapped in "
                f"{type(module).__name__}; regrow takes models that are sharded by fully_shard "
                "(FSDP2). For DistributedDataParallel use gk.distributed.growing."
            )
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        placements = parameter.placements
        by_fsdp = all(isinstance(p, Replicate) for p in placements[:-1])
        if not sharded or not by_fsdp:
            raise TypeError(
                f"{name!r} is a DTensor with placements {placements}, which fully_shard alone does "
                "not make: parts that are tensor parallel cannot grow. Use fully_shard with a "
                "mesh for data parallelism alone."
            )
        if parameter.device_mesh.size() != distributed.get_world_size():
            raise ValueError(
                f"{name!r} is sharded over {parameter.device_mesh.size()} of "
                f"{distributed.get_world_size()} ranks; regrow goes through the first rank of all, "
                "so the mesh must be of all ranks."
            )


def _of_first_rank(make: Callable[[], Outcome]) -> Outcome:
    """The first rank's outcome, on others without its states; what it raises, all ranks raise."""
    outcome: Outcome = {}
    error: Exception | None = None
    if _rank() == 0:
        try:
            outcome = make()
        except Exception as raised:
            error = raised
    box: list[Any] = [({k: v for k, v in outcome.items() if k != "states"}, error)]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box, src=0)
    told, error = box[0]
    if error is not None:
        raise error
    return outcome if _rank() == 0 else told


def on_all_ranks(make: Callable[[], Any]) -> Any:
    """What a function makes on each rank; where it raises on one, all raise."""
    made, error = None, None
    try:
        made = make()
    except Exception as raised:
        error = raised
    errors: list[Any] = [error]
    if distributed.is_initialized():
        errors = [None] * distributed.get_world_size()
        distributed.all_gather_object(errors, error)
    for told in errors if error is None else [error]:
        if told is not None:
            raise told
    return made


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0
