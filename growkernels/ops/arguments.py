"""Arguments of a wrong kind: torch's dispatcher answers them with many lines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGER = (int, torch.SymInt)
_NUMBER = (int, float, torch.SymInt, torch.SymFloat)


def check_tensors(op: str, **arguments: object) -> None:
    """Raises TypeError for the first of the arguments, by name, that is no dense tensor.

    What torch.fx traces with passes for one.
    """
    for name, value in arguments.items():
        if not _passes_for_tensor(value):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}; pass a torch.Tensor")
        if isinstance(value, Tensor) and not _is_dense(value):
            kind = "nested" if value.is_nested else f"of layout {value.layout}"
            raise TypeError(f"{op}: {name} is {kind}; pass a dense tensor, of layout torch.strided")


def check_optional_tensors(op: str, **arguments: object) -> None:
    """`check_tensors` for those that are not None."""
    for name, value in arguments.items():
        if value is not None:
            check_tensors(op, **{name: value})


def check_tensor_lists(op: str, **arguments: object) -> None:
    """Raises TypeError for the first of the arguments, by name, that is not a list of tensors."""
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            # Small networks feel every microsecond: nothing is made where nothing is wrong.
            for index, entry in enumerate(value):
                if not (isinstance(entry, Tensor) and _is_dense(entry)):
                    check_tensors(op, **{f"{name}[{index}]": entry})
        elif isinstance(value, Tensor) or not _passes_for_tensor(value):
            raise TypeError(
                f"{op}: {name} is a {type(value).__name__}; pass a list of tensors, one for every "
                "position"
            )


def check_names(op: str, **arguments: object) -> None:
    """Raises TypeError for the first of the arguments, by name, that is no string."""
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f"{op}: {name} is {value!r}; pass a string")


def check_numbers(op: str, **arguments: object) -> None:
    """Raises TypeError for the first of the arguments, by name, that is no number."""
    for name, value in arguments.items():
        if not isinstance(value, _NUMBER):
            raise TypeError(f"{op}: {name} is {value!r}; pass a number")


def check_integers(op: str, **arguments: object) -> None:
    """Raises TypeError for the first of the arguments, by name, that is no integer."""
    for name, value in arguments.items():
        if not isinstance(value, _INTEGER):
            raise TypeError(f"{op}: {name} is {value!r}; pass an integer")


def pair(name: str, value: int | Sequence[int], least: int | None = None) -> tuple[int, int]:
    """A number for both directions, or (vertical, horizontal), as a pair; symbolic ones too.

    Raises ValueError for anything else, and where one is below `least`. `name` begins the sentence.
    """
    numbers: tuple[int, ...] = ()
    if isinstance(value, _INTEGER):
        numbers = value, value
    elif isinstance(value, (tuple, Sequence)) and len(value) == 2:
        numbers = tuple(value) if all(isinstance(number, _INTEGER) for number in value) else ()
    if not numbers or (least is not None and min(numbers) < least):
        limit = "" if least is None else f", from {least} up"
        raise ValueError(f"{name} is {value!r}; pass an int or a pair of ints{limit}")
    return numbers[0], numbers[1]


def _passes_for_tensor(value: object) -> bool:
    # The stand-ins that torch.fx traces with are no tensors.
    return isinstance(value, Tensor) or hasattr(type(value), "__torch_function__")


def _is_dense(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_nested
