"""The samples of recorded batches as a plain dict, for checkpoints, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.growth.neuron_scaling.criteria import DECREASES
from growkernels.growth.neuron_scaling.cross_sums import CrossSums
from growkernels.growth.neuron_scaling.neuron_rows import has_neurons, rows_of
from growkernels.growth.neuron_scaling.recording import Recording
from growkernels.growth.neuron_scaling.samples import LayerSample
from growkernels.nn.record_fields import (
    COUNTED,
    SUM,
    TENSOR,
    TEXT,
    by_name,
    check_state,
    either,
    entries,
)

KIND = "NeuronScaling"
WHOLE = (  # sums, of the same shape for any number of rows
    *("gradient_sums", "seen"),
    *("cross", "passed", "inputs", "mixed", "hidden", "rows", "squares", "places", "totals"),
)
TENSORS = ("x", "grad", "preact", "keys", "gradient_sums")
_OF_SAMPLE = entries({**dict.fromkeys(TENSORS, TENSOR), "seen": COUNTED}, {})
_OF_SUMS = entries(
    {
        **dict.fromkeys(("cross", "passed", "inputs", "mixed", "hidden"), TENSOR),
        **{"rows": COUNTED, "squares": SUM},
    },
    {"places": COUNTED, "totals": TENSOR},
)
FIELDS = {
    "criterion": TEXT,
    "layers": by_name(either(_OF_SAMPLE, _OF_SUMS)),
    **dict.fromkeys(("batches", "overflowed"), COUNTED),
}


def state_of(kept: Recording[Any], criterion: str) -> dict[str, Any]:
    """Tensors, numbers and names; keys are strings, as torch.distributed.checkpoint needs them."""
    return {
        "driver": KIND,
        "criterion": criterion,
        "layers": {name: dict(vars(sample)) for name, sample in kept.layers.items()},
        "batches": kept.batches,
        "overflowed": kept.overflowed,
    }


def kept_from(
    state: Mapping[str, Any], criterion: str, layers: Collection[str], model: nn.Module
) -> Recording[LayerSample] | Recording[CrossSums]:
    """What a state says was kept of these layers.

    Raises:
        ValueError: a state of another driver, criterion or model.
    """
    check_state(KIND, state, FIELDS)
    if state["criterion"] != criterion:
        raise ValueError(
            f"The state was recorded for criterion {state['criterion']!r}, and this driver's is "
            f"{criterion!r}."
        )
    samples: dict[str, LayerSample] = {}
    sums: dict[str, CrossSums] = {}
    for name, kept in state["layers"].items():
        layer = dict(model.named_modules()).get(name) if name in layers else None
        if layer is None or not has_neurons(layer):
            raise ValueError(
                f"The state is of a layer {name!r}, which is no candidate here: rebuild the model "
                "as it was, and build the NeuronScaling with the same arguments."
            )
        weight = rows_of(layer)
        if "cross" in kept:
            if kept["cross"].shape[1] - weight[0].numel() not in (0, 1):
                raise ValueError(
                    f"The state is of a layer {name!r} of another width; rebuild the model as it "
                    "was."
                )
            own: dict[str, Any] = {
                key: value.to(weight.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in kept.items()
                if key in WHOLE
            }
            # Not in states of linear layers from before there were other ones.
            own.setdefault("places", own["rows"])
            own.setdefault("totals", weight.new_zeros(0))
            sums[name] = CrossSums(**own)
            continue
        if kept["x"].shape[1] != weight.shape[1] or len(kept["gradient_sums"]) != len(weight):
            raise ValueError(
                f"The state is of a layer {name!r} of another width; rebuild the model as it was."
            )
        tensors = {
            key: kept[key].to("cpu" if key == "keys" else weight.device, copy=True)
            for key in TENSORS
        }
        samples[name] = LayerSample(**tensors, seen=kept["seen"])
    if criterion in DECREASES:
        return Recording(sums, state["batches"], state["overflowed"])
    return Recording(samples, state["batches"], state["overflowed"])


def nothing_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a process that has recorded nothing yet, beside one that has."""
    layers = {
        name: {key: _nothing(value) if key in WHOLE else value[:0] for key, value in kept.items()}
        for name, kept in state["layers"].items()
    }
    return {**state, "layers": layers, "batches": 0, "overflowed": 0}


def _nothing(value: Tensor | float) -> Tensor | float:
    return torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)
