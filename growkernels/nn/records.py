"""Records of surgeries: what was done to a model, kept in it, and who can do the same again.

A record is a plain dict of strings, numbers, lists and dicts, so that JSON and checkpoints take it.
Its ``"kind"`` says which function repeats it (``repeats``), its ``"version"`` how it is written;
records from before there were versions have none, and are read as they are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from growkernels.nn.record_fields import Field

Record = dict[str, Any]

VERSION = 1
# Attributes of a changed model: what was done, in order; how many children its lists had after it.
RECORD = "_growkernels_insertions"
CHILDREN = "_growkernels_children"

Repeat = TypeVar("Repeat", bound=Callable[..., object])

repeat_of_kind: dict[str, Callable[..., object]] = {}
fields_of_kind: dict[str, Mapping[str, Field]] = {}
why_incomplete_of_kind: dict[str, Callable[[Mapping[str, Any]], str | None]] = {}


def new_record(kind: str, **fields: Any) -> Record:
    """A record of this kind, in the version that is written now."""
    return {"version": VERSION, "kind": kind, **fields}


def records_of(model: nn.Module) -> list[Record]:
    """What was done to a model so far, in order; copies."""
    return copy.deepcopy(getattr(model, RECORD, []))


def append_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Note one more surgery in the model, without the ``"values"`` that new weights started with:
    the model has those, and they are as large as the weights.
    """
    setattr(model, RECORD, [*records_of(model), copy.deepcopy(without_values(record))])
    setattr(model, CHILDREN, _numbered_children(model))


def warn_of_lists_changed_by_others(model: nn.Module) -> None:
    """Say before a surgery that layers were added or taken away by hand since the last one.

    Records name layers by their numbers, so no builder's model fits those of before and after.
    """
    before, now = getattr(model, CHILDREN, {}), _numbered_children(model)
    for path, count in before.items():
        if path in now and now[path] != count:
            warnings.warn(
                f"{path or 'The model'!r} had {count} children after the last recorded surgery and "
                f"has {now[path]} now: others changed the model, and rebuild() cannot repeat what "
                "they did between the records. Make such changes before the first growth, where "
                "the base model is built.",
                stacklevel=2,
            )
            return


def _numbered_children(model: nn.Module) -> dict[str, int]:
    """Path of every module whose children are numbered -> how many it has."""
    return {
        path: len(module._modules)
        for path, module in model.named_modules()
        if "0" in module._modules and all(name.isdecimal() for name in module._modules)
    }


def without_values(record: Mapping[str, Any]) -> Record:
    """The record as a model keeps it."""
    return {key: value for key, value in record.items() if key != "values"}


def repeats(
    *kinds: str,
    fields: Mapping[str, Field],
    why_incomplete: Callable[[Mapping[str, Any]], str | None] = lambda record: None,
) -> Callable[[Repeat], Repeat]:
    """Let a function(model, record, optimizer) repeat records of these kinds.

    It leaves no record itself, and need not undo anything when it raises. KeyError means that the
    record lacks this key. What it makes on the meta device has the right shapes, and no values.

    Args:
        kinds: of records.
        fields: what each field holds, where the record has it.
        why_incomplete: a sentence about a record that does not hold all values that the surgery
            started from, so that repeating it does not give the same weights; else None.
    """

    def register(repeat: Repeat) -> Repeat:
        repeat_of_kind.update(dict.fromkeys(kinds, repeat))
        fields_of_kind.update(dict.fromkeys(kinds, fields))
        why_incomplete_of_kind.update(dict.fromkeys(kinds, why_incomplete))
        return repeat

    return register
