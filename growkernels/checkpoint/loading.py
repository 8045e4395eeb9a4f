"""Reading a checkpoint: the model grows first, then it takes the states."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from growkernels.checkpoint.layout import (
    HEAD,
    VERSION,
    Stateful,
    clean,
    is_finished,
    listed,
    name_of,
    told_in_a_sentence,
    unpacked,
)
from growkernels.checkpoint.reading import Reader, load_entries
from growkernels.distributed.regrowing import give_memory
from growkernels.growth import rebuild
from growkernels.growth.layer_insertion import sums_state
from growkernels.growth.neuron_scaling import samples_state
from growkernels.growth.processes import Ranks
from growkernels.nn.optimizers import Optimizers

NOTHING_OF = {
    sums_state.KIND: sums_state.nothing_of,
    samples_state.KIND: samples_state.nothing_of,
}


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
        ValueError: no finished checkpoint there, or one that names code, which is not run; a model
            or optimizer that does not fit it.
    """
    folder = Path(path)
    ranks = Ranks()
    unreadable = f"The checkpoint in {folder} cannot be read"
    with ranks.agreed():
        metadata, head = _begin(folder, unreadable)
    with ranks.agreed():
        model = _grown(build, shard, head)
    with ranks.agreed():
        optimizers = listed(None if make_optimizer is None else make_optimizer(model))
        mine = range(ranks.own, head["ranks"], ranks.number) or [0]
        wanted = _wanted(folder, metadata, head, model, optimizers, mine)
    with told_in_a_sentence(unreadable):
        load_entries(wanted, folder, no_dist=not ranks.several)
    state = wanted
    with ranks.agreed():
        set_model_state_dict(model, {k[6:]: v for k, v in state.items() if k.startswith("model/")})
        _set_states(model, optimizers, state, _plain(state, "groups", folder, list))
        extra, drivers = _plain(state, "extra", folder), []
        for number in range(head["drivers"]):
            states = [_plain(state, f"driver/{number}/{rank}", folder, dict) for rank in mine]
            if ranks.own >= head["ranks"] and states[0].get("driver") in NOTHING_OF:
                states = [NOTHING_OF[states[0]["driver"]](states[0])]
            drivers.append(tuple(states))
    optimizer = None if make_optimizer is None else optimizers
    if optimizer is not None and len(optimizers) == 1:
        optimizer = optimizers[0]  # type: ignore[assignment]
    return Restored(model, optimizer, tuple(drivers), extra)


def latest(folder: str | Path) -> Path | None:
    """The newest finished checkpoint among a folder's folders, or None."""
    finished = [entry.parent for entry in Path(folder).glob("*/.metadata")]
    return max(finished, key=lambda f: (f / ".metadata").stat().st_mtime_ns, default=None)


def _begin(folder: Path, unreadable: str) -> tuple[Metadata, dict[str, Any]]:
    """What the checkpoint has, and its head."""
    if not is_finished(folder):
        raise ValueError(
            f"{folder} holds no finished checkpoint: .metadata, which is written last, is missing."
        )
    metadata = Reader(folder).read_metadata()
    if HEAD not in metadata.state_dict_metadata:
        raise ValueError(
            f"{folder} holds a checkpoint that growkernels.checkpoint.save did not write."
        )
    first: dict[str, Any] = {HEAD: ""}
    with told_in_a_sentence(unreadable):
        load_entries(first, folder, no_dist=True)
    head = _head(first[HEAD], folder)
    if head["version"] > VERSION:
        raise ValueError(
            f"{folder} is of version {head['version']}, and this growkernels reads versions up to "
            f"{VERSION}; use the one that wrote it."
        )
    keys = metadata.state_dict_metadata.keys()
    of_drivers = sum(key.startswith("driver/") for key in keys)
    if (
        not {"groups", "extra"} <= keys
        or head["ranks"] < 1
        or head["drivers"] < 0
        or head["ranks"] * head["drivers"] != of_drivers
    ):
        raise ValueError(
            f"The checkpoint in {folder} has not the entries that its head tells of; use another "
            "checkpoint."
        )
    return metadata, head


def _head(text: Any, folder: Path) -> dict[str, Any]:
    """The head, of which every entry is of its type."""
    kinds = {"version": int, "ranks": int, "drivers": int, "records": list, "frozen": list}
    try:
        head: Any = json.loads(text)
        wrong = [key for key, kind in kinds.items() if type(head[key]) is not kind]
    except (ValueError, TypeError, KeyError, RecursionError):
        wrong = ["all"]
    if wrong:
        raise ValueError(
            f"The head of the checkpoint in {folder} is damaged ({', '.join(wrong)}); use another "
            "checkpoint."
        )
    return head  # type: ignore[no-any-return]


def _plain(state: Mapping[str, Any], key: str, folder: Path, kind: type = object) -> Any:
    """What was packed into an entry."""
    try:
        value = unpacked(state[key])
        if not isinstance(value, kind):
            raise UnpicklingError(f"it is a {type(value).__name__}")
        return value
    except (UnpicklingError, AttributeError) as error:  # the entry is no tensor, maybe
        raise ValueError(
            f"{key!r} of the checkpoint in {folder} cannot be read ({error}), and nothing of it "
            "was run; use another checkpoint."
        ) from error


def _grown(
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], object] | None,
    head: Mapping[str, Any],
) -> nn.Module:
    """The model that the states are loaded into."""
    model = build()
    rebuild(model, head["records"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(clean(name) not in head["frozen"])
    if shard is not None:
        given = shard(model)
        model = given if isinstance(given, nn.Module) else model
    give_memory(model, _home_of(model))
    return model


def _wanted(
    folder: Path,
    metadata: Metadata,
    head: Mapping[str, Any],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    mine: Sequence[int],
) -> dict[str, Any]:
    """Memory for all that this process reads; `mine`: of which ranks it takes what they recorded,
    or the form of it.
    """
    wanted = {f"model/{name}": value for name, value in get_model_state_dict(model).items()}
    saved = [key for key in metadata.state_dict_metadata if key.startswith("model/")]
    _check_keys(wanted, saved, folder)
    of_drivers = [f"driver/{n}/{rank}" for n in range(head["drivers"]) for rank in mine]
    wanted |= {key: _blank(metadata, key) for key in ("groups", "extra", *of_drivers)}
    return wanted | _blank_states(metadata, model, optimizers)


def _blank_states(
    metadata: Metadata, model: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, Any]:
    """Memory for the states that were saved, like the parameters as they are sharded now."""
    saved: dict[str, list[str]] = {}
    for key in metadata.state_dict_metadata:
        if key.startswith("optimizer/"):
            saved.setdefault(key.rpartition("/")[0][len("optimizer/") :], []).append(key)
    wanted: dict[str, Any] = {}
    names = {id(p): clean(name) for name, p in model.named_parameters()}
    for part in optimizers:
        for group in part.param_groups:
            at_device = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:
                for key in saved.get(name_of(names, parameter), ()):
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
    names = {id(p): clean(name) for name, p in model.named_parameters()}
    try:
        settings = {name: group for part in saved for group in part for name in group["params"]}
    except (TypeError, KeyError):
        raise ValueError(
            "The checkpoint's settings of optimizers are damaged; use another checkpoint."
        ) from None
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if key.startswith("optimizer/"):
            name, _, entry = key[len("optimizer/") :].rpartition("/")
            found.setdefault(name, {})[entry] = value
    for part in optimizers:
        for group in part.param_groups:
            members = [name_of(names, parameter) for parameter in group["params"]]
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


def _home_of(model: nn.Module) -> torch.device:
    """Where memory is given to what is on the meta device."""
    parameter: Tensor | None = next(iter(model.parameters()), None)
    if isinstance(parameter, DTensor):
        return torch.device(parameter.device_mesh.device_type)
    return torch.get_default_device()
