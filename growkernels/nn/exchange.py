"""Exchanging parts of a model under an optimizer that keeps the state of all other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer

ParamGroup = dict[str, Any]


def check_plain_module(model: object) -> None:
    """Raise TypeError for what is no module, and for one wrapped for data parallelism."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}; pass a torch.nn.Module.")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(
            f"The model is wrapped in {type(model).__name__}: pass model.module (the wrapper may "
            "be called meanwhile), and afterwards wrap the module again, because the old wrapper "
            "does not know the new parameters."
        )


def check_takes_parameters(optimizer: Optimizer) -> None:
    """Raise TypeError unless this is an optimizer whose state can take a new parameter."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass the model's torch.optim optimizer, "
            "or None."
        )
    if isinstance(optimizer, LBFGS | Adagrad):
        raise TypeError(
            f"{type(optimizer).__name__} lays out its state when it is built, so no parameter can "
            "join it; pass optimizer=None and build a new optimizer afterwards."
        )


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


def _spliced(names: Sequence[str], index: int, new: Sequence[str]) -> list[str]:
    return [*names[:index], *new, *names[index + 1 :]]


@contextmanager
def undone_on_error(model: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """If the block raises, model and optimizer get back what they held.

    That is every module's attributes, children, parameters and buffers, the optimizer's groups and
    which parameter has which state; the contents of tensors are not kept, so the block must not
    write into existing ones.
    """
    attributes = [(module, _own_copy(vars(module))) for module in model.modules()]
    groups = [(group, dict(group)) for group in getattr(optimizer, "param_groups", [])]
    lists = [(group["params"], list(group["params"])) for group, _ in groups]
    state = dict(getattr(optimizer, "state", {}))
    try:
        yield
    except BaseException:
        for module, kept in attributes:
            vars(module).clear()
            vars(module).update(kept)
        for group, kept_group in groups:
            group.clear()
            group.update(kept_group)
        for params, kept_params in lists:
            params[:] = kept_params
        if isinstance(optimizer, Optimizer):
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


def _own_copy(attributes: dict[str, Any]) -> dict[str, Any]:
    inner = ("_modules", "_parameters", "_buffers")
    return {name: dict(v) if name in inner else v for name, v in attributes.items()}
