"""How a model has grown: records kept in the model, and growing another one the same way.

A record is a plain dict whose ``"kind"`` says which function repeats it (``repeats``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from growkernels.nn.exchange import undone_on_error
from growkernels.nn.wrappers import check_plain_module

RECORD = "_growkernels_insertions"  # attribute of a grown model: how it grew, in order

Repeat = TypeVar("Repeat", bound=Callable[..., object])

_repeat_of_kind: dict[str, Callable[..., object]] = {}


def insertions(model: nn.Module) -> list[dict[str, Any]]:
    """How a model has grown so far: its inserted layers and grown neurons, in order.

    Plain dicts of strings and numbers, made for checkpoints (``torch.load`` with
    ``weights_only=True`` takes them); ``rebuild`` reads them.
    """
    return copy.deepcopy(getattr(model, RECORD, []))


def append_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Note one more growth step in the model."""
    setattr(model, RECORD, [*insertions(model), copy.deepcopy(record)])


def repeats(*kinds: str) -> Callable[[Repeat], Repeat]:
    """Let a function(model, record, optimizer) repeat records of these kinds.

    It need not undo anything when it raises. KeyError means that the record lacks this key.
    """

    def register(repeat: Repeat) -> Repeat:
        _repeat_of_kind.update(dict.fromkeys(kinds, repeat))
        return repeat

    return register


def rebuild(
    model: nn.Module, records: Sequence[dict[str, Any]], optimizer: Optimizer | None = None
) -> None:
    """Repeat recorded growth on the base model, so that a checkpoint's states fit.

    ::

        model = build_base_model()
        optimizer = build_optimizer(model)
        rebuild(model, checkpoint["insertions"], optimizer)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    Raises:
        TypeError: a model that is wrapped or sharded, or has a part that is.
        ValueError: a record that does not fit the model; model and optimizer are untouched.
    """
    check_plain_module(model)
    with undone_on_error(model, optimizer):
        for number, record in enumerate(records):
            try:
                kind = record["kind"]
                if kind not in _repeat_of_kind:
                    raise ValueError(
                        f"Record {number} of the growth is of the unknown kind {kind!r}; known are "
                        f"{', '.join(_repeat_of_kind)}."
                    )
                _repeat_of_kind[kind](model, record, optimizer)
            except KeyError as error:
                raise ValueError(
                    f"Record {number} of the growth has no {error}; pass what "
                    "gk.growth.insertions(model) gave, whole."
                ) from error
