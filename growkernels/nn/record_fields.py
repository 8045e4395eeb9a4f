"""What the fields of records and of drivers' states hold, asked before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_MOST = 2**31  # no layer has so many neurons
_DEEPEST = 6  # lists in lists: of weights


@dataclass(frozen=True)
class Field:
    """What a field may hold, in words and as a predicate of any value whatever."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MOST)


def _are_numbers(value: object, deepest: int = _DEEPEST) -> bool:
    if isinstance(value, list | tuple):
        return deepest > 0 and all(_are_numbers(entry, deepest - 1) for entry in value)
    return _is_number(value)


TEXT = Field("a string", lambda value: isinstance(value, str))
FLAG = Field("true or false", lambda value: type(value) is bool)
WHOLE = Field(
    f"a whole number from 0 to {_MOST:,}", lambda value: type(value) is int and 0 <= value < _MOST
)
COUNT = Field(
    f"a whole number from 1 to {_MOST:,}", lambda value: type(value) is int and 0 < value < _MOST
)
SEED = Field(
    "a whole number of 64 bits", lambda value: type(value) is int and -(2**63) <= value < 2**64
)
NUMBER = Field("a finite number", lambda value: _is_number(value) and math.isfinite(value))
TENSOR = Field("a tensor", lambda value: isinstance(value, Tensor))
COUNTED = Field("a whole number from 0", lambda value: type(value) is int and value >= 0)
SUM = Field("a number", lambda value: type(value) in (int, float))
NUMBERS = Field("numbers, in lists", _are_numbers)


def or_none(field: Field) -> Field:
    return Field(f"{field.words}, or null", lambda value: value is None or field.holds(value))


def one_of(choices: Sequence[str]) -> Field:
    return Field(
        f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices
    )


def list_of(field: Field, least: int = 0) -> Field:
    return Field(
        f"a list{f' of {least} or more' if least else ''}, each entry {field.words}",
        lambda value: (
            isinstance(value, list | tuple) and len(value) >= least and all(map(field.holds, value))
        ),
    )


def by_name(field: Field) -> Field:
    return Field(
        f"names with, for each, {field.words}",
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(name, str) for name in value)
            and all(map(field.holds, value.values()))
        ),
    )


def by_number(field: Field) -> Field:
    named = by_name(field)
    return Field(
        f"numbers as strings with, for each, {field.words}",
        lambda value: named.holds(value) and all(name.isdecimal() for name in value),
    )


def pair_of(field: Field) -> Field:
    listed = list_of(field)
    return Field(
        f"a pair, each {field.words}", lambda value: listed.holds(value) and len(value) == 2
    )


def either(one: Field, other: Field) -> Field:
    return Field(
        f"{one.words}; or {other.words}", lambda value: one.holds(value) or other.holds(value)
    )


def entries(needed: Mapping[str, Field], more: Mapping[str, Field]) -> Field:
    """A mapping with all of the needed names, perhaps with more, and what these names hold."""
    known = {**needed, **more}
    words = ", ".join(f"{name!r} ({field.words})" for name, field in known.items())
    return Field(
        f"entries {words}",
        lambda value: (
            isinstance(value, Mapping)
            and needed.keys() <= value.keys()
            and all(known[name].holds(held) for name, held in value.items() if name in known)
        ),
    )


def listed_states(driver: str, state: object) -> Sequence[Mapping[str, Any]]:
    """The states of several processes, or one as a list; whose they are, `check_state` tells."""
    states = [state] if isinstance(state, Mapping) else state
    if not isinstance(states, list | tuple) or not states:
        raise ValueError(
            f"The state of the {driver} is a {type(state).__name__}; pass what state_dict() gave, "
            "or a list of what it gave in several processes."
        )
    return states


def check_state(driver: str, state: object, fields: Mapping[str, Field]) -> None:
    """Raise ValueError unless this is a state of such a driver, with all of these fields."""
    state = state if isinstance(state, Mapping) else {}
    given = state.get("driver", "driver unknown")
    if given != driver:
        raise ValueError(f"The state is of a {given}, not of a {driver}.")
    for name, field in fields.items():
        if name not in state or not field.holds(state[name]):
            raise ValueError(
                f"The state of the {driver} has no {name!r} that is {field.words}; pass what "
                "state_dict() gave, whole."
            )
