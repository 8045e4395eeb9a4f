"""The sums over recorded batches as a plain dict, for checkpoints, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from growkernels.growth.layer_insertion.gradient_sums import GradientSums
from growkernels.growth.layer_insertion.positions import Position
from growkernels.nn.record_fields import (
    COUNTED,
    TENSOR,
    TEXT,
    WHOLE,
    by_name,
    by_number,
    check_state,
    entries,
    pair_of,
)

KIND = "LayerInsertion"
_SIDES = by_name(pair_of(WHOLE))
FIELDS = {
    "positions": by_name(TEXT),
    **dict.fromkeys(("virtual", "second_moments", "samples"), by_name(TENSOR)),
    "base": by_number(TENSOR),
    "feature_maps": entries({"positions": _SIDES, "base": by_number(pair_of(WHOLE))}, {}),
    **dict.fromkeys(("batches", "overflowed"), COUNTED),
}


def state_of(sums: GradientSums, positions: Sequence[Position]) -> dict[str, Any]:
    """Tensors, numbers and names; keys are strings, as torch.distributed.checkpoint needs them."""
    own = sums.rescaled(1.0)
    return {
        "driver": KIND,
        "positions": {position.name: position.kind for position in positions},
        "virtual": dict(own.virtual),
        "second_moments": dict(own.second_moments),
        "base": {str(index): total for index, total in own.base.items()},
        "samples": dict(own.samples),
        "feature_maps": {
            "positions": {k: list(v) for k, v in own.feature_maps.items() if isinstance(k, str)},
            "base": {str(k): list(v) for k, v in own.feature_maps.items() if isinstance(k, int)},
        },
        "batches": own.batches,
        "overflowed": own.overflowed,
    }


def sums_from(
    states: Sequence[Mapping[str, Any]], positions: Sequence[Position], device: torch.device
) -> GradientSums:
    """The sums over all states.

    Raises:
        ValueError: no states of this driver, or of other positions.
    """
    expected = {position.name: position.kind for position in positions}
    for state in states:
        check_state(KIND, state, FIELDS)
        if state["positions"] != expected:
            differing = sorted(state["positions"].keys() ^ expected.keys()) or list(expected)
            raise ValueError(
                f"The state is of other positions, for instance {differing[0]!r}: rebuild the "
                "model as it was, and build the LayerInsertion with the same arguments."
            )
        missing = expected.keys() - (state["virtual"].keys() & state["samples"].keys())
        if state["batches"] and missing:
            raise ValueError(
                f"The state has nothing of position {min(missing)!r}; pass what state_dict() gave, "
                "whole."
            )
    return reduce(_added, (_sums(state, device) for state in states))


def nothing_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a process that has recorded nothing yet, beside one that has."""
    zeros = {
        key: {name: torch.zeros_like(total) for name, total in state[key].items()}
        for key in ("virtual", "second_moments", "base")
    }
    return {**state, **zeros, "batches": 0, "overflowed": 0}


def _sums(state: Mapping[str, Any], device: torch.device) -> GradientSums:
    def moved(key: str) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device, copy=True) for name, tensor in state[key].items()}

    maps: dict[str | int, tuple[int, int]] = {}
    maps.update((name, (h, w)) for name, (h, w) in state["feature_maps"]["positions"].items())
    maps.update((int(index), (h, w)) for index, (h, w) in state["feature_maps"]["base"].items())
    return GradientSums(
        virtual=moved("virtual"),
        second_moments=moved("second_moments"),
        base={int(index): total for index, total in moved("base").items()},
        samples=moved("samples"),
        feature_maps=maps,
        batches=state["batches"],
        overflowed=state["overflowed"],
    )


def _added(a: GradientSums, b: GradientSums) -> GradientSums:
    """The sums of both, of which neither is used again; what they read last is b's."""
    if not (a.recorded and b.recorded):
        some = b if b.recorded else a
        return replace(some, overflowed=a.overflowed + b.overflowed)
    return replace(
        a.with_batch(b),
        batches=a.batches + b.batches,
        overflowed=a.overflowed + b.overflowed,
    )
