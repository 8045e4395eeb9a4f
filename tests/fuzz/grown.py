"""What is true of every growth: records make the same of another model, and training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from random_networks import (
    DTYPES,
    Words,
    batch_of,
    build,
    check_same_function,
    function_of,
    loss_of,
    optimizer_of,
)
from refusals import Everything, optimizers_of, same_bits
from torch import Tensor, nn

import growkernels as gk


def rebuilt(words: Words, records: Sequence[Mapping[str, Any]]) -> nn.Module:
    model = build(words)
    if records:
        gk.growth.rebuild(model, records)
    return model


def check_state(found: Any, wanted: Any, what: str) -> None:
    """Asserts equal states, to the bit."""
    if isinstance(wanted, Tensor):
        assert same_bits(found, wanted), f"{what} differs"
    elif isinstance(wanted, Mapping):
        assert set(found) == set(wanted), f"{what}: {sorted(map(str, set(found) ^ set(wanted)))}"
        for key in wanted:
            check_state(found[key], wanted[key], f"{what} {key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), what
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            check_state(one, other, f"{what} {number}")
    else:
        assert found == wanted or (found != found and wanted != wanted), (what, found, wanted)


class States:
    """The states before a growth, and what `grow_state` makes of them."""

    def __init__(self, model: nn.Module, optimizer: Any, words: Words) -> None:
        self.words = words
        self.several = isinstance(optimizer, list)
        self.records = gk.growth.insertions(model)
        self.model = copy.deepcopy(dict(model.state_dict()))
        parts = optimizers_of(optimizer)
        self.optimizers = [copy.deepcopy(part.state_dict()) for part in parts]
        self.kinds = [type(part) for part in parts]
        names = {id(p): name for name, p in model.named_parameters()}
        self.names = [
            [names.get(id(p), "") for g in part.param_groups for p in g["params"]] for part in parts
        ]
        self.known = all(all(entries) for entries in self.names)

    def function(self) -> tuple[Tensor, float]:
        """What the network computed with these."""
        model = rebuilt(self.words, self.records)
        model.load_state_dict(self.model)
        return function_of(model, probe(self.words))

    def check_grown(self, record: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
        """Asserts that the record makes of the states what the growth made of the model."""
        if not self.known:
            return
        given: Any = {"optimizer_state": None}
        if self.optimizers:
            given = {
                "optimizer_state": self.optimizers,
                "optimizer_type": self.kinds,
                "parameter_names": self.names,
            }
            if not self.several:
                given = {key: value[0] for key, value in given.items()}
        grown, steps = gk.growth.grow_state(
            record, self.model, build=lambda: rebuilt(self.words, self.records), **given
        )
        check_state(grown, dict(model.state_dict()), "the model's state")
        if self.optimizers:
            found = [each["state"] for each in (steps if self.several else [steps])]
            wanted = [part.state_dict()["state"] for part in optimizers_of(optimizer)]
            check_state(found, wanted, "the optimizer's state")


def check_after(model: nn.Module, optimizer: Any, words: Words, held: bool) -> None:
    """Asserts that records give the same network, and that the optimizer holds and trains it."""
    fresh = build(words)
    other = None if optimizer is None else optimizer_of(fresh, words)
    gk.growth.rebuild(fresh, gk.growth.insertions(model), other)
    fresh.load_state_dict(model.state_dict())
    fresh.train(model.training)
    for one, same in zip(optimizers_of(optimizer), optimizers_of(other), strict=True):
        same.load_state_dict(one.state_dict())
    x = batch_of(words, 7, "normal")
    check_same_function(function_of(model, x), function_of(fresh, x), torch.float64)
    assert gk.growth.insertions(fresh) == gk.growth.insertions(model)
    parts = optimizers_of(optimizer)
    if not parts:
        return
    has = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
    assert len(has) == len(set(has)), "a parameter is in the optimizer twice"
    if held:
        assert set(has) >= {id(p) for p in model.parameters()}, "parameters are not optimized"
    if words["optimizer"] in ("LBFGS", "Adafactor") or words["batch"] < 2:
        return
    loss_of(model, x).backward()
    for part in parts:
        part.step()
        for parameter, state in part.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    assert value.shape == parameter.shape, (key, value.shape, parameter.shape)
        part.zero_grad()


def holds_all(model: nn.Module, optimizer: Any) -> bool:
    parts = optimizers_of(optimizer)
    has = {id(p) for part in parts for group in part.param_groups for p in group["params"]}
    return has >= {id(p) for p in model.parameters()}


@contextmanager
def driven(model: nn.Module, driver: Any) -> Iterator[Any]:
    """A driver that is closed at the end, whatever happens, and leaves no hooks."""
    try:
        yield driver
    finally:
        driver.close()
        hooks = Everything(model, None).parts["hooks"]
        assert not any(hooks.values()), f"hooks are left on {hooks}"


def record_batches(driver: Any, model: nn.Module, words: Words) -> None:
    """As many recorded batches as the words say, each with its own backward passes."""
    for number in range(words["batches"]):
        x = batch_of(words, number)
        with driver.recording():
            for _ in range(words["backwards"]):
                loss_of(model, x).backward()
    for parameter in model.parameters():
        parameter.grad = None


def probe(words: Words) -> Tensor:
    """An input of numbers that the function is compared on."""
    return batch_of({**words, "batch": 3}, 5, "normal")


def dtype_of(words: Words) -> torch.dtype:
    return DTYPES[words["dtype"]]
