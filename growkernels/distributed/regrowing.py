"""Growing a model that ``fully_shard`` has sharded: through full states into a new model.

``fully_shard`` cannot be undone or applied twice, and parameters that come after it belong to no
group that reduces their gradients. So the states are gathered on the first rank, grow there as
plain dicts (``gk.growth.grow_state``), and go to a new model, sharded by the same policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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
from growkernels.growth.processes import Ranks
from growkernels.growth.records import Records, read_records
from growkernels.growth.state import shared_parameters_kept
from growkernels.nn.grown_layers import Branch
from growkernels.nn.optimizers import Optimizers, as_one, parts_of

Outcome = Mapping[str, Any]
Made = TypeVar("Made", bound=Optimizers)


def regrow(
    model: nn.Module,
    optimizer: Optimizers,
    records: Records,
    *,
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], object],
    make_optimizer: Callable[[nn.Module], Made],
) -> tuple[nn.Module, Made]:
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
        optimizer: the model's, or a list of all of them.
        records: what to do, see ``gk.growth.grow_state``.
        build: gives the base model, before any growth, best on the meta device; what
            ``gk.growth.insertions(model)`` says is rebuilt in it.
        shard: applies ``fully_shard`` to a model, as it was applied to this one.
        make_optimizer: gives the optimizer of a sharded model, or as many as were given, with the
            same parameters each; learning rates and the other settings of groups are those of the
            optimizer that was given.

    Raises:
        TypeError: a wrapped model, or one with parts that are tensor parallel.
        ValueError: what ``grow_state`` raises, on every rank; a mesh that is not of all ranks; a
            buffer that is in no state and that ``build`` leaves on the meta device; optimizers
            from ``make_optimizer`` that share the parameters out otherwise.
    """
    ranks = Ranks()
    with ranks.agreed():
        optimizers = _parts(optimizer)
        _check_sharding(model)
    history = insertions(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state = get_model_state_dict(model, options=options)
    optimizer_states = [state_by_names(model, part, options) for part in optimizers]

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
            optimizer_states,
            build=build_before,
            optimizer_type=[type(part) for part in optimizers],
        )
        return {
            "records": listed,
            "held": [_held(state) for state in states[1]],
            "with_state": [name for state in states[1] for name in state["state"]],
            "states": states,
        }

    grown = _of_first_rank(ranks, grow)
    model_state, optimizer_states = grown.get("states", ({}, [{}] * len(optimizers)))

    def build_after() -> nn.Module:
        new = build_before()
        rebuild(new, grown["records"])
        new = _sharded(new, shard)
        give_memory(new, _device_of(model))
        return new

    with ranks.agreed():
        new = build_after()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(new, model_state, options=options)
    new.train(model.training)
    with ranks.agreed():
        made = make_optimizer(new)
        parts = _parts(made)
        _check_shared_out_alike(new, parts, grown["held"])
    # Not strict: a parameter that no backward pass came to has no state.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    for part, state in zip(parts, optimizer_states, strict=True):
        set_optimizer_state_dict(new, part, state, options=options)
        keep_states(new, part, grown["with_state"])
    return new, made


def _parts(optimizer: Optimizers) -> Sequence[Optimizer]:
    """The optimizers that step."""
    one = as_one(optimizer)
    if not isinstance(one, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; regrow takes a torch.optim optimizer of "
            "the model, or a list of them."
        )
    return parts_of(one)


def _held(state: Mapping[str, Any]) -> list[str]:
    return [name for group in state["param_groups"] for name in group["params"]]


def _check_shared_out_alike(
    model: nn.Module, parts: Sequence[Optimizer], held: Sequence[Sequence[str]]
) -> None:
    """Raise ValueError if a parameter's state would go to another optimizer than had it."""
    if len(parts) != len(held):
        raise ValueError(
            f"make_optimizer gives {len(parts)} optimizers, and {len(held)} were given; give as "
            "many, in the same order."
        )
    holder = {name: number for number, names in enumerate(held) for name in names}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, part in enumerate(parts):
        for parameter in (p for group in part.param_groups for p in group["params"]):
            name = names.get(id(parameter), "")
            if holder.get(name, number) != number:
                raise ValueError(
                    f"make_optimizer gives {name!r} to optimizer {number}, and the growth leaves "
                    f"it to optimizer {holder[name]}, as it does in one process; share parameters "
                    "out by the same rule."
                )


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


def _of_first_rank(ranks: Ranks, make: Callable[[], Outcome]) -> Outcome:
    """The first rank's outcome, on others without its states; what it raises, all ranks raise."""
    outcome: Outcome = {}
    with ranks.agreed():
        if ranks.own == 0:
            outcome = make()
    told = ranks.gathered({k: v for k, v in outcome.items() if k != "states"})
    return outcome if ranks.own == 0 else told[0]
