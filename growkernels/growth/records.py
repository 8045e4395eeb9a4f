"""How a model has grown: the records that it keeps, and growing another one the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from growkernels.nn.compiled import without_compiling_wrapper
from growkernels.nn.convert import CONVERSION
from growkernels.nn.exchange import undone_on_error
from growkernels.nn.linear_from_conv1d import TRANSPOSITION
from growkernels.nn.optimizers import Optimizers, as_one
from growkernels.nn.records import (
    VERSION,
    Record,
    append_record,
    fields_of_kind,
    records_of,
    repeat_of_kind,
    why_incomplete_of_kind,
)
from growkernels.nn.separate_attention import SEPARATION
from growkernels.nn.wrappers import check_plain_module

# One record, several, or either as the JSON text of it.
Records = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str


def insertions(model: nn.Module) -> list[Record]:
    """What surgeries have made of a model so far, in order: inserted layers, grown neurons,
    converted convolutions, separated attention and exchanged Conv1D layers.

    Plain dicts of strings, numbers and lists, made for checkpoints (``torch.load`` with
    ``weights_only=True`` takes them) and JSON; ``rebuild`` reads them, and their
    ``json.dumps`` too. torch.distributed.checkpoint takes lists apart into keys that the next model
    may not have: give it the text, ``{"growth": json.dumps(insertions(model))}``.
    """
    return records_of(model)


def read_records(records: Records) -> list[Mapping[str, Any]]:
    """Records as a list, whatever form they come in; their kinds and versions are known ones.

    Raises:
        TypeError: something else than records.
        ValueError: text that is no JSON; a record of an unknown kind, of a later version, or with a
            field of another type.
    """
    given: Any = records
    if isinstance(records, str):
        try:
            given = json.loads(records)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"The text of the growth records is no JSON ({error}); pass "
                "json.dumps(gk.growth.insertions(model)), whole."
            ) from None
    listed = [given] if isinstance(given, Mapping) else given
    if not isinstance(listed, Sequence) or not all(isinstance(r, Mapping) for r in listed):
        raise TypeError(
            f"The growth records are a {type(records).__name__}; pass what "
            "gk.growth.insertions(model) gave, one record of it, or the JSON text of either."
        )
    for number, record in enumerate(listed):
        if "kind" not in record:
            raise ValueError(_lacks(number, "'kind'"))
        version = record.get("version", 0)
        if not isinstance(record["kind"], str) or type(version) is not int or version < 0:
            raise ValueError(
                f"Record {number} of the growth has a 'kind' that is no string, or a 'version' "
                "that is no whole number; pass what gk.growth.insertions(model) gave, whole."
            )
        if record["kind"] not in repeat_of_kind:
            raise ValueError(
                f"Record {number} of the growth is of the unknown kind {record['kind']!r}; known "
                f"are {', '.join(repeat_of_kind)}."
            )
        if version > VERSION:
            raise ValueError(
                f"Record {number} of the growth is of version {version}, and this "
                f"growkernels reads versions up to {VERSION}; use the one that wrote it."
            )
        for name, field in fields_of_kind[record["kind"]].items():
            if name in record and not field.holds(record[name]):
                raise ValueError(
                    f"Record {number} of the growth has a {type(record[name]).__name__} under "
                    f"{name!r} that is not {field.words}; pass what gk.growth.insertions(model) "
                    "gave, whole."
                )
    return list(listed)


def rebuild(model: nn.Module, records: Records, optimizer: Optimizers | None = None) -> None:
    """Repeat recorded surgeries on the base model, so that a checkpoint's states fit.

    ::

        model = build_base_model()
        optimizer = build_optimizer(model)
        rebuild(model, checkpoint["insertions"], optimizer)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    A model on the meta device gets what it needs too; its values come with the loaded states.
    Separations and conversions that the base model went through before, being the first records of
    both, are not repeated.

    Args:
        model: as it was before.
        records: from ``insertions``, one of them, or the JSON text of either.
        optimizer: the model's optimizer, a list of them, or None.

    Raises:
        TypeError: a model that is wrapped or sharded, or has a part that is; no records.
        ValueError: a record that does not fit the model; model and optimizer are untouched.
    """
    check_plain_module(model)
    model = without_compiling_wrapper(model)
    listed = read_records(records)
    optimizer = as_one(optimizer)
    done = _done_by_builder(records_of(model), listed)
    with undone_on_error(model, optimizer):
        repeat_all(model, listed, optimizer, done)


def repeat_all(
    model: nn.Module,
    records: Sequence[Mapping[str, Any]],
    optimizer: Optimizer | None,
    begin: int = 0,
) -> None:
    """Repeat the records from number `begin` on, of those that `read_records` gave.

    Not undone on error.
    """
    for number, record in enumerate(records):
        if number < begin:
            continue
        try:
            repeat_of_kind[record["kind"]](model, record, optimizer)
        except KeyError as error:
            raise ValueError(_lacks(number, error)) from error
        except (AttributeError, IndexError) as error:
            raise ValueError(
                f"Record {number} of the growth names what the model does not have "
                f"({str(error).partition(chr(10))[0]}); it belongs to another model."
            ) from error
        append_record(model, record)


def check_complete(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a record without all values that its surgery started from."""
    for number, record in enumerate(records):
        try:
            reason = why_incomplete_of_kind[record["kind"]](record)
        except KeyError as error:
            raise ValueError(_lacks(number, error)) from error
        if reason:
            raise ValueError(f"Record {number} of the growth does not hold all values. {reason}")


def _done_by_builder(own: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> int:
    """How many of the first records are of exchanges that the code that built the model made."""
    count = 0
    for mine, record in zip(own, records, strict=False):
        if mine != record or record["kind"] not in (CONVERSION, SEPARATION, TRANSPOSITION):
            break
        count += 1
    return count


def _lacks(number: int, key: object) -> str:
    return (
        f"Record {number} of the growth has no {key}; pass what gk.growth.insertions(model) gave, "
        "whole."
    )
