"""Editing a model and its optimizer while both keep what they have learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from growkernels.growth.module_graph import is_plain_sequential, weight_layers
from growkernels.nn.exchange import (
    check_takes_parameters,
    group_of_each,
    start_state,
)
from growkernels.nn.optimizers import ParamGroup, warn_of_unheld
from growkernels.nn.weights import sources, weight_parameters


def insert_after(model: nn.Module, name: str, new: nn.Module) -> str:
    """Put `new` behind the module at path `name`, on its output; returns the new module's path.

    The new module gets the old one's training mode. In a plain nn.Sequential it becomes the next
    child; children numbered 0, 1, 2, ... are renumbered, so the paths and state_dict keys behind
    it move by one. Anywhere else (an attribute, a ModuleList, a Sequential with its own forward)
    the module is replaced by Sequential(module, new), so no other path changes.

    Raises:
        ValueError: `name` is not a module below `model`.
    """
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old = parent._modules[child]
    except (AttributeError, KeyError):
        old = None
    if old is None:
        raise ValueError(f"There is no module at {name!r} to insert a layer behind.")
    new.train(old.training)
    prefix = f"{parent_name}." if parent_name else ""
    if not is_plain_sequential(parent):
        wrapped = nn.Sequential(old, new)
        wrapped.training = old.training
        parent._modules[child] = wrapped
        return f"{prefix}{child}.1"

    return f"{prefix}{insert_child(parent, child, new)}"


def insert_child(parent: nn.Module, child: str, new: nn.Module) -> str:
    """Put `new` behind a child of a Sequential or ModuleList; returns its key there.

    Children numbered 0, 1, 2, ... are renumbered; others keep their names.
    """
    keys = list(parent._modules)
    index = keys.index(child) + 1
    if keys == [str(i) for i in range(len(keys))]:
        keys, new_key = [str(i) for i in range(len(keys) + 1)], str(index)
    else:
        number = 1
        while f"{child}_grown{number}" in keys:
            number += 1
        new_key = f"{child}_grown{number}"
        keys.insert(index, new_key)
    children = list(parent._modules.values())
    children.insert(index, new)
    parent._modules.clear()
    parent._modules.update(zip(keys, children, strict=True))
    return new_key


def groups_for_new_layer(
    model: nn.Module, name: str, optimizer: Optimizer
) -> tuple[ParamGroup, ParamGroup]:
    """The parameter groups that a layer behind `name` joins: for its weights, for its biases.

    They are those of the nearest layer with a weight at or before `name` that the optimizer holds
    (of a computed weight: what it is computed from), or else behind it. A bias goes with the
    nearest bias at or before `name`, or else with one behind it that has the weight's learning
    rate, or else with the weight.

    Raises:
        TypeError: not an optimizer, or one whose state cannot take a new parameter.
        ValueError: the optimizer holds no weight of the model's layers.
    """
    check_takes_parameters(optimizer)
    group_of = group_of_each(optimizer)
    before, behind = weight_layers(model, name)
    layers = [*before, *behind]
    weights = _groups([p for layer in layers for p in weight_parameters(layer)], group_of)
    if not weights:
        raise ValueError(
            "The optimizer holds none of the model's Linear or Conv2d weights, nor those of other "
            "layers, so the group of the new parameters cannot be told; pass the optimizer of this "
            "model, or None."
        )
    nearest = [p for layer in before for p in sources(layer, "bias")]
    if nearest:
        warn_of_unheld(optimizer, {"bias": nearest[0]})
    biases = _groups(nearest, group_of)
    others = _groups([p for layer in behind for p in sources(layer, "bias")], group_of)
    biases += [group for group in others if group["lr"] == weights[0]["lr"]]
    return weights[0], (biases or weights)[0]


def _groups(
    parameters: Sequence[nn.Parameter], group_of: Mapping[int, ParamGroup]
) -> list[ParamGroup]:
    return [group_of[id(p)] for p in parameters if id(p) in group_of]


def join_groups(
    model: nn.Module,
    new: nn.Module,
    optimizer: Optimizer,
    groups: tuple[ParamGroup, ParamGroup],
) -> None:
    """Add new's parameters (part of model by now) to the groups for weights and for biases.

    Parameters of one dimension count as biases. Each takes the place in its group that it has in
    model.parameters(). An optimizer built over the grown model by the same code then has the same
    order, which is what a saved optimizer state is matched by. The state of all other parameters
    stays.

    Raises:
        TypeError: an optimizer that cannot step with one of them.
    """
    join_group_of_each(
        model,
        new,
        optimizer,
        {id(p): groups[1] if p.dim() <= 1 else groups[0] for p in new.parameters()},
    )


def join_group_of_each(
    model: nn.Module, new: nn.Module, optimizer: Optimizer, group_of: Mapping[int, ParamGroup]
) -> None:
    """The same with a group for each parameter, by its id."""
    named = [group for group in optimizer.param_groups if "param_names" in group]
    names = {
        id(p): name
        for group in named
        for p, name in zip(group["params"], group["param_names"], strict=True)
    }
    order = {id(p): place for place, p in enumerate(model.parameters())}
    for parameter in new.parameters():
        group = group_of[id(parameter)]
        members = group["params"]
        before = [
            index
            for index, member in enumerate(members)
            if order.get(id(member), len(order)) < order[id(parameter)]
        ]
        members.insert(before[-1] + 1 if before else 0, parameter)
        start_state(optimizer, group, parameter)
    names.update((id(p), name) for name, p in model.named_parameters())
    for group in named:
        group["param_names"] = [names[id(p)] for p in group["params"]]
