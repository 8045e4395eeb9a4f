"""Growth as a transformation of states: what a record does to full state dicts.

What is saved, sharded or elsewhere has states, keyed by names, and no live modules. Here the
surgeries run on a model that holds the given tensors and trains nothing, and on an optimizer that
holds the given states and never steps; then both are read out again. So there is one
implementation of each surgery, and a state grows by the same bits as a live model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.records import Records, check_complete, read_records, repeat_all
from growkernels.nn.optimizers import as_one

State = dict[str, Any]
Kind = type[Optimizer] | None
Names = Sequence[str] | None


@overload
def grow_state(
    records: Records,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
    *,
    build: Callable[[], nn.Module],
    optimizer_type: Kind = None,
    parameter_names: Names = None,
) -> tuple[State, State | None]: ...


@overload
def grow_state(
    records: Records,
    model_state: Mapping[str, Any],
    optimizer_state: Sequence[Mapping[str, Any]],
    *,
    build: Callable[[], nn.Module],
    optimizer_type: Sequence[Kind] | None = None,
    parameter_names: Sequence[Names] | None = None,
) -> tuple[State, list[State]]: ...


def grow_state(
    records: Records,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    build: Callable[[], nn.Module],
    optimizer_type: Kind | Sequence[Kind] = None,
    parameter_names: Names | Sequence[Names] = None,
) -> tuple[State, Any]:
    """What surgeries make of full state dicts, as a pure function.

    ::

        record = inserter.record(position)
        model_state, optimizer_state = grow_state(
            record, checkpoint["model"], checkpoint["optimizer"], build=build_model
        )

    The bits are those that the live surgery leaves in ``model.state_dict()`` and in the optimizer.
    Nothing that was given is written to; tensors that do not change are those that were given.

    Why ``build``: which modules there are (what is an nn.Sequential, whose later children an
    insertion renumbers, which convolution has which stride, what shares its weights) is in no state
    dict.

    Args:
        records: from ``inserter.record``, ``scaling.record``, ``gk.nn.convert(...,
            record_only=True).record``, ``gk.growth.insertions`` or JSON text of such; in order.
        model_state: of ``model.state_dict()``, whole: no shards, no wrapper's prefix.
        optimizer_state: None; or with names, as
            ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` gives it with
            ``full_state_dict=True``; or with numbers, as ``optimizer.state_dict()`` gives it. The
            result is of the same form. What the optimizer holds no state of has none afterwards.
            A list of such states, of the several optimizers of one model, gives a list.
        build: gives the model as it was before the first of the records (with earlier ones
            rebuilt), on any device; its own values are not used, so the meta device is best.
        optimizer_type: of the state; None: told by its groups' settings, of torch's optimizers.
        parameter_names: for a state with numbers, the names in their order. None: the groups'
            ``param_names``, or that of ``model.parameters()`` where there is one group. Both are
            lists with an entry for each optimizer where ``optimizer_state`` is a list.

    Raises:
        ValueError: a record that does not fit or does not hold the values that its surgery started
            from; states of another model; an optimizer that cannot be told.
        TypeError: an optimizer that the live surgery refuses too.
    """
    listed = read_records(records)
    check_complete(listed)
    model = build()
    _fill(model, model_state)
    if optimizer_state is None:
        repeat_all(model, listed, None)
        return dict(model.state_dict()), None
    given, kinds, names = _listed(optimizer_state, optimizer_type, parameter_names)
    named = [_with_names(*each) for each in zip(given, names, [model] * len(given), strict=True)]
    parts = [_stand_in(state, model, kind) for state, kind in zip(named, kinds, strict=True)]
    repeat_all(model, listed, as_one(parts))
    grown = [_read(part, model) for part in parts]
    for number, (state, with_names) in enumerate(zip(given, named, strict=True)):
        if with_names is not state:
            grown[number] = _with_numbers(grown[number])
    one = isinstance(optimizer_state, Mapping)
    return dict(model.state_dict()), grown[0] if one else grown


def _listed(
    state: Mapping[str, Any] | Sequence[Mapping[str, Any]], kind: Any, names: Any
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Kind], Sequence[Names]]:
    """The states of all optimizers, with the type and the names that are given for each."""
    if isinstance(state, Mapping):
        return [state], [kind], [names]
    if not isinstance(state, list | tuple) or not all(isinstance(s, Mapping) for s in state):
        raise ValueError(
            f"The optimizer's state is a {type(state).__name__}; pass what optimizer.state_dict() "
            "gave, or a list of such."
        )
    given = {"optimizer_type": kind, "parameter_names": names}
    for argument, entries in given.items():
        if entries is None:
            given[argument] = [None] * len(state)
        elif isinstance(entries, type) or len(entries) != len(state):
            raise ValueError(
                f"The states are of {len(state)} optimizers; pass {argument} as a list with an "
                "entry for each."
            )
    return state, given["optimizer_type"], given["parameter_names"]


def _fill(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model the tensors of a state; parameters that are one stay one."""
    if not isinstance(state, Mapping):
        raise ValueError(f"The model's state is a {type(state).__name__}; pass model.state_dict().")
    own = model.state_dict()
    if missing := sorted(own.keys() - state.keys()) or sorted(state.keys() - own.keys()):
        which = "lacks" if missing[0] in own else "has"
        raise ValueError(
            f"The model's state {which} {missing[0]!r}, unlike that of the model that build() "
            "gives; build() must give the model as it was before the first record, with those of "
            "gk.growth.insertions(model) rebuilt."
        )
    for name, value in own.items():
        given = state[name]
        if isinstance(value, Tensor) and not isinstance(given, Tensor):
            raise ValueError(
                f"{name!r} is a {type(given).__name__} in the state, and a tensor in the model "
                "that build() gives; pass model.state_dict()."
            )
        if isinstance(value, Tensor) and given.shape != value.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(given.shape)} in the state and {tuple(value.shape)} in "
                "the model that build() gives; pass full states, and build the same model."
            )
    with shared_parameters_kept(model):
        model.load_state_dict(
            {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}, assign=True
        )


@contextmanager
def shared_parameters_kept(model: nn.Module) -> Iterator[None]:
    """Parameters that are one at several places are one afterwards, whatever replaces them."""
    holders: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(name)
    yield
    for first, *others in holders.values():
        for name in others:
            parent, _, child = name.rpartition(".")
            shared = model.get_parameter(first)
            if model.get_parameter(name) is not shared:
                model.get_submodule(parent)._parameters[child] = shared


def _stand_in(
    named: Mapping[str, Any], model: nn.Module, kind: type[Optimizer] | None
) -> Optimizer:
    """An optimizer that holds the state, for surgeries to work on; it cannot step."""
    kind = kind or _kind_of(named)
    optimizer: Optimizer = object.__new__(kind)
    optimizer.defaults = dict(named["param_groups"][0]) if named["param_groups"] else {}
    optimizer.state = defaultdict(dict)
    optimizer.param_groups = []
    parameters = dict(model.named_parameters())
    for group in named["param_groups"]:
        for name in group["params"]:
            if name not in parameters:
                raise ValueError(
                    f"The optimizer's state is of a parameter {name!r}, which the model that "
                    "build() gives does not have."
                )
        members = [parameters[name] for name in group["params"]]
        optimizer.param_groups.append({**group, "params": members})
    for name, state in named["state"].items():
        if name not in parameters:
            raise ValueError(
                f"The optimizer's state is of a parameter {name!r}, which the model that build() "
                "gives does not have."
            )
        optimizer.state[parameters[name]] = dict(state)
    return optimizer


def _kind_of(named: Mapping[str, Any]) -> type[Optimizer]:
    """Torch's optimizer whose groups have the most settings that these groups have."""
    found: type[Optimizer] | None = None
    best = 0
    parameter = nn.Parameter(torch.zeros(1, 1, device="cpu"))
    for kind in vars(torch.optim).values():
        if not (isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer):
            continue
        settings = kind([parameter]).defaults.keys()  # type: ignore[call-arg]
        if best < len(settings) and all(settings <= g.keys() for g in named["param_groups"]):
            found, best = kind, len(settings)
    if found is None:
        groups = named["param_groups"]
        known = sorted(groups[0].keys() - {"params"}) if groups else []
        raise ValueError(
            "Which optimizer the state is of cannot be told from its settings "
            f"({', '.join(known)}); pass optimizer_type=."
        )
    return found


def _read(optimizer: Optimizer, model: nn.Module) -> State:
    """The state with names that `get_optimizer_state_dict` would give."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {names[id(p)]: dict(entries) for p, entries in optimizer.state.items() if entries}
    return {"state": state, "param_groups": groups}


def _with_names(state: Mapping[str, Any], names: Names, model: nn.Module) -> Mapping[str, Any]:
    """The state with names for numbers; itself, if it has names."""
    if "state" not in state or "param_groups" not in state:
        raise ValueError(
            "The optimizer's state has no 'state' and 'param_groups'; pass what "
            "optimizer.state_dict() or get_optimizer_state_dict gave, not flattened."
        )
    groups = state["param_groups"]
    if not _formed(state["state"], groups):
        raise ValueError(
            "The optimizer's state is not of the form of one: 'state' has a mapping for each "
            "parameter, and 'param_groups' is a list of mappings, whose 'params' are all numbers "
            "(those of 'state' among them) or all names; pass what optimizer.state_dict() gave."
        )
    numbers = [entry for group in groups for entry in group["params"]]
    if not any(isinstance(entry, int) for entry in numbers):
        return state
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None and len(groups) == 1:
        names = [name for name, _ in model.named_parameters()]
    if names is None or len(names) != len(numbers):
        has = "several groups" if names is None else f"{len(numbers)} parameters"
        raise ValueError(
            f"The optimizer's state has numbers for parameters, and {has}; pass parameter_names=, "
            "the names in the order of optimizer.param_groups."
        )
    name_of = dict(zip(numbers, names, strict=True))
    return {
        "state": {name_of[number]: entries for number, entries in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[number] for number in group["params"]]} for group in groups
        ],
    }


def _formed(state: Any, groups: Any) -> bool:
    """Whether the two parts of an optimizer's state have the form that any optimizer gives them."""
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        return False
    parameters: list[Any] = []
    for group in groups:
        if not isinstance(group, Mapping):
            return False
        for names in (group.get("params"), group.get("param_names", ())):
            if not isinstance(names, list | tuple):
                return False
        if not all(isinstance(name, str) for name in group.get("param_names", ())):
            return False
        parameters += group["params"]
    named = all(isinstance(entry, str) for entry in parameters)
    numbered = all(type(entry) is int for entry in parameters) and state.keys() <= set(parameters)
    return (named or numbered) and all(isinstance(entries, Mapping) for entries in state.values())


def _with_numbers(named: State) -> State:
    order = [name for group in named["param_groups"] for name in group["params"]]
    number_of = {name: number for number, name in enumerate(order)}
    return {
        "state": {number_of[name]: entries for name, entries in named["state"].items()},
        "param_groups": [
            {**group, "params": [number_of[name] for name in group["params"]]}
            for group in named["param_groups"]
        ],
    }
