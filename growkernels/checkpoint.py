"""Checkpoints of grown models on torch.distributed.checkpoint, for any number of processes.

What a model has grown by is read first, so the model that the states are loaded into has grown as
well, whatever the code that builds it knows of growth. Floor 4.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from growkernels.distributed.regrowing import give_memory, on_all_ranks
from growkernels.growth import insertions, rebuild
from growkernels.growth.layer_insertion import sums_state
from growkernels.growth.neuron_scaling import samples_state
from growkernels.nn.optimizers import Optimizers

VERSION = 1
HEAD = "growkernels"  # what is read first
NOTHING_OF = {
    sums_state.KIND: sums_state.nothing_of,
    samples_state.KIND: samples_state.nothing_of,
}


class Stateful(Protocol):
    """A driver, a trigger, or anything else with a state of its own in each process."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Restored:
    """What ``load`` gives.

    Attributes:
        model: grown, with its values, sharded if ``shard`` was given.
        optimizer: what ``make_optimizer`` gave, with states and settings; None without one.
        drivers: for each saved driver the states that this process goes on from.
        extra: what was given to ``save``.
    """

    model: nn.Module
    optimizer: Any
    drivers: tuple[tuple[dict[str, Any], ...], ...]
    extra: Any

    def load_drivers(self, *drivers: Stateful) -> None:
        """Give drivers that were built for this model the states of the saved ones, in order.

        Raises:
            ValueError: another number of drivers than was saved.
        """
        if len(drivers) != len(self.drivers):
            raise ValueError(
                f"The checkpoint is of {len(self.drivers)} drivers, not of {len(drivers)}; give "
                "the same ones in the same order."
            )
        for driver, states in zip(drivers, self.drivers, strict=True):
            known = states[0].get("driver") in NOTHING_OF
            driver.load_state_dict(list(states) if known else states[0])


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizers | None = None,
    drivers: Sequence[Stateful] = (),
    *,
    extra: Any = None,
    wait: bool = True,
) -> Future[Any] | None:
    """Write a checkpoint into a new folder; every process calls it.

    Parameters and optimizer states are written as they are, shard by shard. Nothing is stepped: an
    optimizer that has no states yet has none in the checkpoint.

    Args:
        path: a folder that holds no checkpoint yet, so that a kill cannot spoil one.
        model: plain, sharded by ``fully_shard``, or in a DistributedDataParallel.
        optimizer: the model's, or a list of them.
        drivers: whose recorded batches (of each process) shall survive: LayerInsertion,
            NeuronScaling, triggers, anything with a ``state_dict``.
        extra: of the first process; what ``torch.load(weights_only=True)`` reads: schedulers'
            states, step counts.
        wait: False: copy to the CPU and write in the background (``dcp.async_save``); the process
            group then needs a backend for the CPU.

    Returns:
        None, or the Future of what goes on in the background.

    Raises:
        ValueError: the folder holds a checkpoint, or an optimizer of another model.
    """
    folder = Path(path)
    if (folder / ".metadata").exists():
        raise ValueError(
            f"{folder} holds a checkpoint; save each one into a folder of its own, so that a kill "
            "while writing leaves the one before."
        )
    inner = _inner(model)
    optimizers = _listed(optimizer)
    rank = _rank()
    head = {
        "version": VERSION,
        "records": insertions(inner),
        "frozen": [_clean(n) for n, p in inner.named_parameters() if not p.requires_grad],
        "ranks": _ranks(),
        "drivers": len(drivers),
    }
    state: dict[str, Any] = {HEAD: json.dumps(head)}
    state.update((f"model/{name}", v) for name, v in get_model_state_dict(inner).items())
    names = {id(p): _clean(name) for name, p in inner.named_parameters()}
    for part in optimizers:
        for parameter, entries in part.state.items():
            name = _name_of(names, parameter)
            state.update((f"optimizer/{name}/{key}", value) for key, value in entries.items())
    groups = [
        [
            {**group, "params": [_name_of(names, p) for p in group["params"]]}
            for group in part.param_groups
        ]
        for part in optimizers
    ]
    state["groups"] = _packed(groups)
    state["extra"] = _packed(extra)
    for number, driver in enumerate(drivers):
        state[f"driver/{number}/{rank}"] = _packed(driver.state_dict())
    with _alone_without_a_warning():
        if wait:
            state_dict_saver.save(
                state, checkpoint_id=folder, no_dist=not distributed.is_initialized()
            )
            return None
        return state_dict_saver.async_save(state, checkpoint_id=folder)  # type: ignore[return-value]


def load(
    path: str | Path,
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], object] | None = None,
    make_optimizer: Callable[[nn.Module], Optimizers] | None = None,
) -> Restored:
    """The model of a checkpoint, grown as it was, on any number of processes.

    ::

        restored = gk.checkpoint.load(path, build, shard, make_optimizer)
        model, optimizer = restored.model, restored.optimizer
        restored.load_drivers(LayerInsertion(model))

    What processes had recorded is dealt out among those that there are now: sums of drivers over
    all of them stay what they were.

    Args:
        path: a folder from ``save``.
        build: gives the base model, before any growth; on the meta device it needs no memory of its
            own, and gets some on the CPU, or on what ``shard`` moves it to.
        shard: applies ``fully_shard`` to a model; None: the model is whole in every process, to be
            wrapped by DistributedDataParallel or not at all.
        make_optimizer: gives the optimizer (or a list) of the grown model, with groups of the same
            parameters; their settings are those of the checkpoint.

    Raises:
        ValueError: no finished checkpoint there; a model or optimizer that does not fit it.
    """
    folder = Path(path)
    if not (folder / ".metadata").exists():
        raise ValueError(
            f"{folder} holds no finished checkpoint: .metadata, which is written last, is missing."
        )
    metadata = FileSystemReader(folder).read_metadata()
    saved = metadata.state_dict_metadata
    if HEAD not in saved:
        raise ValueError(
            f"{folder} holds a checkpoint that growkernels.checkpoint.save did not write."
        )
    head = json.loads(_read(folder, {HEAD: ""})[HEAD])
    if head["version"] > VERSION:
        raise ValueError(
            f"{folder} is of version {head['version']}, and this growkernels reads versions up to "
            f"{VERSION}; use the one that wrote it."
        )

    def grown() -> nn.Module:
        model = build()
        rebuild(model, head["records"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_clean(name) not in head["frozen"])
        if shard is not None:
            given = shard(model)
            model = given if isinstance(given, nn.Module) else model
        give_memory(model, _home_of(model))
        return model

    model = on_all_ranks(grown)
    wanted = {f"model/{name}": value for name, value in get_model_state_dict(model).items()}
    _check_keys(wanted, [key for key in saved if key.startswith("model/")], folder)
    wanted |= {key: _blank(metadata, key) for key in ("groups", "extra")}
    mine = _dealt_out(head["ranks"])
    of_drivers = [f"driver/{n}/{rank}" for n in range(head["drivers"]) for rank in mine]
    wanted |= {key: _blank(metadata, key) for key in of_drivers}
    optimizers = _listed(None if make_optimizer is None else make_optimizer(model))
    wanted |= _blank_states(metadata, model, optimizers)
    state = _read(folder, wanted)
    set_model_state_dict(model, {k[6:]: v for k, v in state.items() if k.startswith("model/")})
    _set_states(model, optimizers, state, _unpacked(state["groups"]))
    drivers = []
    for number in range(head["drivers"]):
        states = [_unpacked(state[f"driver/{number}/{rank}"]) for rank in mine]
        if _rank() >= head["ranks"] and states[0].get("driver") in NOTHING_OF:
            states = [NOTHING_OF[states[0]["driver"]](states[0])]
        drivers.append(tuple(states))
    optimizer = None if make_optimizer is None else optimizers
    if optimizer is not None and len(optimizers) == 1:
        optimizer = optimizers[0]  # type: ignore[assignment]
    return Restored(model, optimizer, tuple(drivers), _unpacked(state["extra"]))


def latest(folder: str | Path) -> Path | None:
    """The newest finished checkpoint among a folder's folders, or None."""
    finished = [entry.parent for entry in Path(folder).glob("*/.metadata")]
    return max(finished, key=lambda f: (f / ".metadata").stat().st_mtime_ns, default=None)


def _dealt_out(ranks: int) -> list[int]:
    """Of which of the saved processes this one takes what they had recorded, or the form of it."""
    return list(range(_rank(), ranks, _ranks())) or [0]


def _blank_states(
    metadata: Metadata, model: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, Any]:
    """Memory for the states that were saved, like the parameters as they are sharded now."""
    saved: dict[str, list[str]] = {}
    for key in metadata.state_dict_metadata:
        if key.startswith("optimizer/"):
            saved.setdefault(key.rpartition("/")[0][len("optimizer/") :], []).append(key)
    wanted: dict[str, Any] = {}
    names = {id(p): _clean(name) for name, p in model.named_parameters()}
    for part in optimizers:
        for group in part.param_groups:
            at_device = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:
                for key in saved.get(_name_of(names, parameter), ()):
                    wanted[key] = _blank(metadata, key, parameter, bool(at_device))
    return wanted


def _blank(
    metadata: Metadata,
    key: str,
    parameter: nn.Parameter | None = None,
    scalars_at_device: bool = False,
) -> Any:
    """Memory that an entry can be loaded into."""
    entry = metadata.state_dict_metadata[key]
    if not isinstance(entry, TensorStorageMetadata):
        return None
    dtype = entry.properties.dtype
    if parameter is None:
        return torch.empty(entry.size, dtype=dtype, device="cpu")
    if entry.size == parameter.shape and entry.size:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if entry.size and isinstance(parameter, DTensor):
        raise ValueError(
            f"{key!r} has shape {tuple(entry.size)}, unlike its parameter "
            f"({tuple(parameter.shape)}), and how it would be sharded is not known; load with "
            "shard=None, or use another optimizer."
        )
    scalar = not entry.size and not scalars_at_device
    device = torch.device("cpu") if scalar else parameter.device
    return torch.empty(entry.size, dtype=dtype, device=device)


def _set_states(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state: Mapping[str, Any],
    saved: Sequence[Sequence[Mapping[str, Any]]],
) -> None:
    """The states to their parameters, and the settings of groups to the groups of the same."""
    names = {id(p): _clean(name) for name, p in model.named_parameters()}
    settings = {name: group for part in saved for group in part for name in group["params"]}
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if key.startswith("optimizer/"):
            name, _, entry = key[len("optimizer/") :].rpartition("/")
            found.setdefault(name, {})[entry] = value
    for part in optimizers:
        for group in part.param_groups:
            members = [_name_of(names, parameter) for parameter in group["params"]]
            groups = [settings[name] for name in members if name in settings]
            if len({id(g) for g in groups}) > 1 or len(groups) < len(members):
                raise ValueError(
                    "make_optimizer gives a group whose parameters were not all in one group when "
                    "the checkpoint was saved; group the grown model's parameters by the same rule."
                )
            kept = ("params", "param_names")
            group.update((k, v) for g in groups[:1] for k, v in g.items() if k not in kept)
            for name, parameter in zip(members, group["params"], strict=True):
                if name in found:
                    part.state[parameter] = found[name]


def _check_keys(wanted: Mapping[str, Any], saved: Sequence[str], folder: Path) -> None:
    for key in sorted(wanted.keys() ^ set(saved)):
        has = "lacks" if key in wanted else "has"
        raise ValueError(
            f"The checkpoint in {folder} {has} {key[6:]!r}, unlike the model that build() gives "
            "after the growth that is recorded there; build the same base model."
        )


def _read(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    with _alone_without_a_warning():
        state_dict_loader.load(
            wanted, checkpoint_id=folder, no_dist=not distributed.is_initialized()
        )
    return wanted


def _packed(content: Any) -> Tensor:
    """Bytes, for what processes have each of their own and no template for when they load."""
    file = io.BytesIO()
    torch.save(content, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True, map_location="cpu")


@contextmanager
def _alone_without_a_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _listed(optimizer: Optimizers | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _name_of(names: Mapping[int, str], parameter: Tensor) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise ValueError(
            f"The optimizer holds a parameter of shape {tuple(parameter.shape)} that the model "
            "does not have; pass the optimizer of this model."
        )
    return name


def _clean(name: str) -> str:
    """A parameter's name without what compilation and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _inner(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel and torch.compile around it."""
    inner: nn.Module | None = None
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = model.module
    else:
        inner = model._modules.get("_orig_mod")
    return model if inner is None else _inner(inner)


def _home_of(model: nn.Module) -> torch.device:
    """Where memory is given to what is on the meta device."""
    parameter: Tensor | None = next(iter(model.parameters()), None)
    if isinstance(parameter, DTensor):
        return torch.device(parameter.device_mesh.device_type)
    return torch.get_default_device()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1
