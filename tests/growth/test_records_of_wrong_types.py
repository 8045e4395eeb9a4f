"""Every field of every kind of record is replaced by what it cannot be: one sentence, and the model
is as it was.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from all_surgeries import grown, network

from growkernels.growth import grow_state, insertions, rebuild
from growkernels.growth.records import read_records
from growkernels.nn.records import fields_of_kind

WRONG: dict[str, Any] = {
    "null": None,
    "string": "nonsense",
    "list": [1, "x"],
    "mapping": {"a": {"b": "c"}},
    "true": True,
    "huge": 10**30,
    "of 62 bits": 2**62,
    "not finite": float("inf"),
    "nested": [[[[[[[[]]]]]]]],
}

# No configuration counts the blocks; weights and seeds may be anything.
ALLOWED = {("counted_at", "null"), ("values", "not finite"), ("seed", "of 62 bits")}


def places_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    keys = value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    for key in keys:
        held = value[key]
        yield from places_in(held, (*at, key))


def with_other(record: dict[str, Any], at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    inside: Any = changed
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = value
    return changed


OTHERS: list[dict[str, Any]] = [
    {
        "version": 1, "kind": "block", "position": "blocks.1", "template": "blocks.0",
        "zero": ["weight"], "seed": 3, "counted_at": 1,
    },
    {"version": 1, "kind": "linear_from_conv1d", "paths": ["a"]},
    {
        "version": 1, "kind": "neurons", "form": "pair", "gain": 2.0, "depth": {"mlp.0": [0]},
        "width": [], "init": "eigenvector", "scale": 0.2,
        "values": {"mlp.0": {"weight": [[0.5] * 8], "bias": [0.0]}},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return insertions(grown(network()))


def test_all_kinds_are_here(records: list[dict[str, Any]]) -> None:
    kinds = {record["kind"] for record in (*records, *OTHERS)}
    of_insertions = set(fields_of_kind) - kinds  # they share their fields
    assert all(fields_of_kind[k] is fields_of_kind["residual"] for k in of_insertions)
    for record in (*records, *OTHERS):
        known = {"kind", "version", *fields_of_kind[record["kind"]]}
        assert record.keys() <= known
        read_records(record)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_types(records: list[dict[str, Any]], wrong: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    modules = list(model.named_modules())
    refused = 0
    for number, record in enumerate([*records, *OTHERS]):
        for at in places_in(record):
            damaged = with_other(record, at, WRONG[wrong])
            if (at[0], wrong) in {
                ("counted_at", "null"),
                ("values", "not finite"),
                ("seed", "of 62 bits"),
            }:
                continue  # no configuration counts the blocks; weights, and seeds, may be anything
            with pytest.raises(ValueError, match=r"[a-z]") as caught:
                rebuild(model, [*records[:number], damaged])
            assert "\n" not in str(caught.value), at
            assert len(str(caught.value)) < 1000, at
            refused += 1
    assert refused > 60
    assert list(model.named_modules()) == modules
    assert insertions(model) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="Record 0"):
        grow_state({**OTHERS[0], "position": WRONG["list"]}, before, build=network)


def test_text_that_is_nested_beyond_all_bounds() -> None:
    deep = "[" * 100_000
    for text in (deep, '{"kind": ' + deep, '{"kind": "residual", "width": ' + deep):
        with pytest.raises(ValueError, match="is no JSON"):
            rebuild(network(), text)
    nested: Any = []
    for _ in range(10 * sys.getrecursionlimit()):
        nested = [nested]
    for kind, fields in fields_of_kind.items():
        for name in fields:
            with pytest.raises(ValueError, match=f"a list under '{name}' that is not"):
                read_records({"kind": kind, name: nested})


def test_what_a_record_holds_is_told() -> None:
    record = {"kind": "conversion", "plan": {"0": "all"}, "init": "svd"}
    with pytest.raises(ValueError, match="a dict under 'plan' that is not names with, for each, a"):
        rebuild(network(), json.dumps([record]))
