"""Exchanging parts of a model: may a layer be exchanged, and what becomes of what it carries.

Every surgery asks here first (``obstacle``, ``check_takes_parameters``), so that what would be lost
is refused in a sentence before anything changes: hooks on the layer or on the gradients of its
parameters, weights that are computed from others, uses in other places. Gradients and the
optimizer's state go along where they have a meaning for the new parameters (``carry_state``), and a
new parameter gets what its optimizer's next step needs (``start_state``). On any error everything
is as before (``undone_on_error``).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Muon, Optimizer, SparseAdam

from growkernels.nn.compiled import forget_compiled
from growkernels.nn.hooks import hooks_of, is_watched
from growkernels.nn.optimizers import (
    Optimizers,
    ParamGroup,
    as_one,
    part_of_group,
    part_with,
    parts_of,
    warn_of_unheld,
)
from growkernels.nn.records import warn_of_lists_changed_by_others
from growkernels.nn.weights import why_computed, why_watched
from growkernels.nn.wrappers import outdate_wrappers

Places = Mapping[int, Sequence[str]]
MOMENTUM = "momentum_buffer"


def places_of(model: nn.Module) -> Places:
    """Where each module and parameter of a model is used: id -> paths."""
    places: defaultdict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        places[id(module)].append(path)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    return places


def obstacle(layer: nn.Module, places: Places, kept: Iterable[Tensor | None] = ()) -> str | None:
    """Why a layer of a model cannot be exchanged for another one, as a clause; None: it can.

    Args:
        layer: the layer, which goes with all that is in it.
        places: of its model.
        kept: those of its parameters that the new layer has too, with their hooks.
    """
    for part in (*layer.modules(), *layer.parameters()):
        paths = places[id(part)]
        if len(paths) > 1:
            kind = "layer" if isinstance(part, nn.Module) else "parameter"
            return (
                f"the same {kind} is used at {' and '.join(map(repr, paths))}; what is used in "
                "several places cannot be exchanged"
            )
    for module in layer.modules():
        if reason := why_computed(module):
            return f"{reason}; make it an ordinary parameter first"
    if any(is_watched(module) for module in layer.modules()):
        return (
            "a driver of growkernels.growth watches it by hooks, which the new layer would not "
            "have; call the driver's close() first"
        )
    if any(has_hooks(module) for module in layer.modules()):
        return "it carries hooks, which the new layer would not have; remove them first"
    stay = {id(parameter) for parameter in kept}
    if reason := why_watched((n, p) for n, p in layer.named_parameters() if id(p) not in stay):
        return f"{reason}; remove them first"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a module carries hooks, which are lost if another module takes its place."""
    return bool(
        hooks_of(module)
        or module._state_dict_hooks
        or module._state_dict_pre_hooks
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


def check_takes_parameters(optimizer: Optimizer) -> None:
    """Raise TypeError unless this is an optimizer whose state can take a new parameter."""
    check_follows(optimizer)
    if any(isinstance(part, Adagrad) for part in parts_of(optimizer)):
        raise TypeError(
            "Adagrad lays out its state when it is built, so no parameter can join it; pass "
            "optimizer=None and build a new optimizer afterwards."
        )


def check_follows(optimizer: Optimizer) -> None:
    """Raise TypeError unless an optimizer's parameters can be exchanged for others."""
    parts = parts_of(optimizer)
    if len(parts) > 1:
        for part in parts:
            check_follows(part)
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass the model's torch.optim optimizer, "
            "or None."
        )
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS lays out its state when it is built, so no parameter can join it; pass "
            "optimizer=None and build a new optimizer afterwards."
        )
    if isinstance(optimizer, SparseAdam):
        raise TypeError(
            "SparseAdam takes sparse gradients alone, and those of new parameters are dense; pass "
            "optimizer=None and build another optimizer afterwards."
        )
    if inner := _wrapped(optimizer):
        attribute, kind = inner
        raise TypeError(
            f"{name} wraps an optimizer ({kind}, its {attribute!r}), whose state would not follow "
            "an exchange of parameters; pass optimizer=None and build both anew afterwards."
        )


def _wrapped(optimizer: Optimizer) -> tuple[str, str] | None:
    """The attribute in which an optimizer holds another one, and the type of that."""
    for attribute, value in vars(optimizer).items():
        held: Iterable[object] = (value,)
        if isinstance(value, list | tuple):
            held = value
        elif isinstance(value, dict) and attribute != "state":
            held = value.values()
        for entry in held:
            if isinstance(entry, Optimizer) and entry is not optimizer:
                return attribute, type(entry).__name__
    return None


def check_holds_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ValueError unless the optimizer holds a parameter of the model."""
    held = group_of_each(optimizer)
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            "The optimizer holds no parameter of the model; pass the optimizer of this model, "
            "or None."
        )


def group_of_each(optimizer: Optimizer) -> dict[int, ParamGroup]:
    """The parameter group of every parameter that the optimizer holds, by id."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def exchange_parameters(
    optimizer: Optimizer,
    old: Mapping[str, nn.Parameter],
    new: Mapping[str, nn.Parameter],
) -> None:
    """Put new parameters where the first of the old ones is; the old ones and their state go.

    Keys are the parameters' own names, such as "weight"; where the groups keep names, those of the
    new parameters are made with them. Old parameters that the optimizer does not hold are passed
    over; if it holds none, nothing happens.
    """
    groups = group_of_each(optimizer)
    warn_of_unheld(optimizer, old)
    held = {name: p for name, p in old.items() if id(p) in groups}
    for place, (own_name, parameter) in enumerate(held.items()):
        group = groups[id(parameter)]
        index = next(i for i, p in enumerate(group["params"]) if p is parameter)
        if "param_names" in group:
            prefix = group["param_names"][index].removesuffix(own_name)
            names = [prefix + name for name in new] if place == 0 else []
            group["param_names"] = _spliced(group["param_names"], index, names)
        added: list[nn.Parameter] = list(new.values()) if place == 0 else []
        group["params"][index : index + 1] = added
        optimizer.state.pop(parameter, None)
        for joined in added:
            start_state(optimizer, group, joined)


def order_as_registered(optimizer: Optimizer, module: nn.Module) -> None:
    """Let a module's parameters, at the places that they have in the groups, take the module's
    order, as in an optimizer that is built over the model as it is now.
    """
    order = {id(p): place for place, p in enumerate(module.parameters())}
    for group in optimizer.param_groups:
        members = group["params"]
        places = [index for index, p in enumerate(members) if id(p) in order]
        sources = sorted(places, key=lambda index: order[id(members[index])])
        for key in {"params", "param_names"} & group.keys():
            entries = list(group[key])
            for place, source in zip(places, sources, strict=True):
                entries[place] = group[key][source]
            group[key][:] = entries


def _spliced(names: Sequence[str], index: int, new: Sequence[str]) -> list[str]:
    return [*names[:index], *new, *names[index + 1 :]]


def start_state(optimizer: Optimizer, group: ParamGroup, parameter: nn.Parameter) -> None:
    """What a parameter that joined a group needs for the optimizer's next step.

    Where others have a state already, it is the one that torch's optimizers begin with, a step
    count of 0 included. It would come with the first step; but a checkpoint that is taken before
    that lacks it, and torch.distributed.checkpoint.state_dict lets a parameter without a saved
    state begin at a step count of 1.

    torch's fused SGD takes the momentum of all parameters of a group or of none; a momentum of 0
    does what none does (but for a dampening, which then damps the first gradient too).

    Raises:
        TypeError: the optimizer cannot step with this parameter.
    """
    optimizer = part_of_group(optimizer, group)
    if isinstance(optimizer, Muon) and parameter.dim() != 2:
        raise TypeError(
            f"Muon takes matrices alone, and the new layer has a parameter of shape "
            f"{tuple(parameter.shape)}; pass all optimizers of the model as a list, or "
            "optimizer=None and give the new parameters to your optimizers afterwards."
        )
    if isinstance(optimizer, SGD) and group.get("fused") and group["momentum"]:
        states = (optimizer.state.get(p, {}) for p in group["params"])
        if any(state.get(MOMENTUM) is not None for state in states):
            optimizer.state[parameter].setdefault(MOMENTUM, torch.zeros_like(parameter))
    elif parameter.requires_grad and any(optimizer.state.values()):
        _begin(optimizer, group, parameter)


def _begin(optimizer: Optimizer, group: ParamGroup, parameter: nn.Parameter) -> None:
    """Make the state that torch's optimizers make in their first step, by their own function."""
    begin = getattr(type(optimizer), "_init_group", None)
    if begin is None or not begin.__module__.startswith("torch.optim."):
        return
    lists: list[list[Any]] = [[] for _ in list(inspect.signature(begin).parameters)[2:]]
    grad = parameter.grad
    try:
        parameter.grad = torch.zeros_like(parameter)
        begin(optimizer, {**group, "params": [parameter]}, *lists)
    finally:
        parameter.grad = grad
        if not optimizer.state.get(parameter, True):  # it was only asked for
            del optimizer.state[parameter]


def state_obstacle(optimizer: Optimizer, parameter: nn.Parameter) -> str | None:
    """Why a parameter's state cannot be cut or enlarged like the parameter; None: it can."""
    optimizer = part_with(optimizer, parameter)
    name = type(optimizer).__name__
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or not value.dim():
            continue
        if value.shape != parameter.shape:
            return (
                f"{name} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}"
            )
        numbers = value.is_floating_point() or value.is_complex()
        if not numbers or type(value) not in (Tensor, nn.Parameter):  # of 8 bits, say
            kind = str(value.dtype) if not numbers else type(value).__name__
            return f"{name} keeps {key!r} as {kind}, in a code of its own"
    return None


def exchange_with_state(
    optimizer: Optimizer,
    name: str,
    old: nn.Parameter,
    new: Mapping[str, nn.Parameter],
    pieces: Callable[[Tensor], Sequence[Tensor]],
) -> None:
    """Put the pieces of an old parameter in its place, each with its piece of the state.

    Args:
        name, old: the old parameter, of which ``state_obstacle`` knows nothing.
        new: the new ones, each a piece of the old one's values, under the names they have.
        pieces: those of any tensor that is shaped like the old parameter. Step counts and other
            numbers are the same for all.
    """
    state = dict(optimizer.state.get(old, {}))
    exchange_parameters(optimizer, {name: old}, new)
    for key, value in state.items():
        parts: Sequence[Any] = [value] * len(new)
        if isinstance(value, Tensor):
            parts = pieces(value) if value.dim() else [value.clone() for _ in new]
        for parameter, part in zip(new.values(), parts, strict=True):
            optimizer.state[parameter][key] = part


@contextmanager
def undone_on_error(
    model: nn.Module, optimizer: Optimizers | None, *others: object
) -> Iterator[None]:
    """If the block raises, model, optimizer and other objects get back what they held.

    That is every module's class, attributes, children, parameters, buffers and hooks, the
    optimizer's groups and which parameter has which state, and the attributes of the others and of
    the configurations that transformers' modules keep (their numbers of layers). The contents of
    tensors are not kept, so the block must not write into existing ones. If it does not raise,
    wrappers that do not know the model's parameters any more refuse to be called.
    """
    warn_of_lists_changed_by_others(model)
    classes = [(module, type(module)) for module in model.modules()]
    kept = [_Kept(vars(module)) for module, _ in classes]
    kept += [_Kept(vars(other)) for other in (*others, *configurations(model))]
    given = as_one(optimizer)
    for part in parts_of(given) if isinstance(given, Optimizer) else ():
        kept += [_Kept(group) for group in part.param_groups]
        kept += [_Kept(part.state)]
    try:
        yield
        outdate_wrappers(model)
        forget_compiled(model)
    except BaseException:
        for module, kind in classes:
            module.__class__ = kind
        for entry in kept:
            entry.restore()
        raise


def configurations(model: nn.Module) -> list[Any]:
    """The objects that modules of transformers keep as ``config``, each once."""
    found = [vars(module).get("config") for module in model.modules()]
    return list({id(c): c for c in found if hasattr(c, "to_dict")}.values())


CONTAINERS = (dict, OrderedDict, defaultdict, list)


class _Kept:
    """The entries of a dict, and those of dicts and lists directly in it, to be put back.

    They are put back into the same containers, because others (the handles of hooks) hold these.
    """

    def __init__(self, table: dict[Any, Any]) -> None:
        self._table = table
        self._entries = dict(table)
        self._inner = [
            (value, value.copy()) for value in table.values() if type(value) in CONTAINERS
        ]

    def restore(self) -> None:
        self._table.clear()
        self._table.update(self._entries)
        for value, entries in self._inner:
            value.clear()
            if isinstance(value, list):
                value.extend(entries)
            else:
                value.update(entries)
