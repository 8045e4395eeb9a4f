"""States that have not the form of one: one sentence each, whatever stands in which place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from all_surgeries import Network, inserter_at, network, train

from growkernels.growth import grow_state

WRONG: dict[str, Any] = {
    "none": None,
    "string": "nonsense",
    "list": [1, "x"],
    "mapping": {"a": 1},
    "huge": 10**30,
    "nested": [[[]]],
    "tensor": torch.ones(3, 5),
}
PLACES: list[tuple[Any, ...]] = [
    ("model",),
    ("model", "mlp.0.weight"),
    ("model", "convs.1.num_batches_tracked"),
    ("optimizer",),
    ("optimizer", "state"),
    ("optimizer", "state", 0),
    ("optimizer", "param_groups"),
    ("optimizer", "param_groups", 0),
    ("optimizer", "param_groups", 0, "params"),
    ("optimizer", "param_groups", 0, "param_names"),
]
# No state of an optimizer, states of another entry, and an entry without any.
FINE = {(("optimizer",), "none"), (("optimizer", "state", 0), "mapping")}


def build() -> Network:
    with torch.device("meta"):
        return network()


@pytest.fixture(scope="module")
def saved() -> tuple[dict[str, Any], dict[str, Any]]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    record = inserter_at(model, "mlp.1", "linear_relu").record("mlp.1")
    return record, {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_one_sentence(
    saved: tuple[dict[str, Any], dict[str, Any]], place: tuple[Any, ...], wrong: str
) -> None:
    record, states = saved[0], copy.deepcopy(saved[1])
    inside: Any = states
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = WRONG[wrong]
    if (place, wrong) in FINE:
        grow_state(record, states["model"], states["optimizer"], build=build)
        return
    with pytest.raises(ValueError, match=r"[a-z]") as caught:
        grow_state(record, states["model"], states["optimizer"], build=build)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stray", [99, "mlp.0.weight"])
def test_a_state_of_a_parameter_in_no_group(
    saved: tuple[dict[str, Any], dict[str, Any]], stray: Any
) -> None:
    record, states = saved[0], copy.deepcopy(saved[1])
    states["optimizer"]["state"][stray] = states["optimizer"]["state"].pop(0)
    with pytest.raises(
        ValueError, match=r"is not of the form of one: .*those of 'state' among them"
    ):
        grow_state(record, states["model"], states["optimizer"], build=build)
