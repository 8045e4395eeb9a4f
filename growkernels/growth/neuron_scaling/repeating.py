"""The same growth of neurons again, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from growkernels.growth.neuron_scaling import growth_step
from growkernels.growth.neuron_scaling.candidates import NEEDS
from growkernels.growth.neuron_scaling.initial_values import INITS
from growkernels.growth.neuron_scaling.neuron_rows import rows_of
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons, share_of_parents
from growkernels.growth.neuron_scaling.widening_step import layer_to_grow
from growkernels.nn.grown_layers import FORMS
from growkernels.nn.record_fields import (
    COUNT,
    NUMBER,
    NUMBERS,
    TEXT,
    WHOLE,
    by_name,
    entries,
    list_of,
    one_of,
)
from growkernels.nn.records import Record, repeats


def with_values(record: Record, values: Mapping[str, NewNeurons]) -> Record:
    """The record with what its new neurons start with, where that is not in the model itself.

    Numbers as lists: every float of the types that layers have survives JSON exactly.
    """
    if not _needs_values(record) or record["init"] == "parent":
        return record
    listed = {
        name: {
            key: value.double().tolist() for key, value in vars(new).items() if value is not None
        }
        for name, new in values.items()
    }
    return {**record, "values": listed}


def why_incomplete(record: Mapping[str, Any]) -> str | None:
    """What is missing for new neurons to start with the same values, as a sentence."""
    if not _needs_values(record) or record.get("init") == "parent" or "values" in record:
        return None
    if "init" not in record:
        return (
            "It was written by an earlier growkernels and does not say what its new neurons start "
            "with; grow the live model, or a copy of its checkpoint."
        )
    return (
        f"Its new neurons start with init={record['init']!r}, whose values come from recorded "
        "batches and are not in the model's own record; take the record from "
        "scaling.record(chosen, ...), before growing."
    )


def _needs_values(record: Mapping[str, Any]) -> bool:
    """Whether some of the new weights start with something else than 0."""
    return bool(record["width"]) or (bool(record["depth"]) and record["form"] != "single")


_OUTPUTS = list_of(WHOLE)
_PATHS = list_of(TEXT)
_WIDTH = entries(
    {
        "layer": TEXT,
        "role": one_of(tuple(NEEDS)),
        "follower": TEXT,
        "heads": COUNT,
        "neurons": COUNT,
    },
    {"parents": _OUTPUTS, "readers": _PATHS, "partners": _PATHS, "norms": _PATHS},
)


@repeats(
    growth_step.RECORD_KIND,
    fields={
        "form": one_of(FORMS),
        "gain": NUMBER,
        "depth": by_name(list_of(WHOLE, least=1)),
        "width": list_of(_WIDTH),
        "init": one_of(INITS),
        "scale": NUMBER,
        "values": by_name(by_name(NUMBERS)),
    },
    why_incomplete=why_incomplete,
)
def repeat_growth(model: nn.Module, record: Mapping[str, Any], optimizer: Optimizer | None) -> None:
    """Grow what a record says; new neurons whose start is not known get weights of 0."""
    values = None if why_incomplete(record) else _values(model, record)
    growth_step.apply(model, record, optimizer, values)


def _values(model: nn.Module, record: Mapping[str, Any]) -> dict[str, NewNeurons] | None:
    if not _needs_values(record):
        return None
    parents: dict[str, list[int]] = {width["layer"]: width["parents"] for width in record["width"]}
    parents.update(record["depth"])
    values: dict[str, NewNeurons] = {}
    for name, outputs in parents.items():
        layer = layer_to_grow(model, name, outputs)
        if "values" not in record:
            values[name] = share_of_parents(layer, outputs, record["scale"])
            continue
        given = record["values"][name]
        parts = {
            key: torch.tensor(value, dtype=torch.float64).to(layer.weight)
            for key, value in given.items()
        }
        weight = parts["weight"]
        shape = rows_of(layer).shape[1:]
        if weight.shape[1:] != shape:
            raise ValueError(
                f"The record starts new neurons of layer {name!r} with weights of shape "
                f"{tuple(weight.shape[1:])}, and the layer has {tuple(shape)}; it "
                "belongs to another model."
            )
        values[name] = NewNeurons(**parts)
    return values
