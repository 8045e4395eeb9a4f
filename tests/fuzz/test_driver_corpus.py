"""Calls of layers, solvers and drivers that once failed, and some fresh ones of every family."""

from __future__ import annotations

import random

import pytest
from driver_fuzzing import CALLS, FAMILIES, check, make_case
from fuzz_runs import Case


@pytest.mark.parametrize(
    "case", CALLS.stored(), ids=lambda case: f"{case['family']}-{case['seed']}"
)
def test_what_once_failed(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_calls(family: str) -> None:
    """One of them at least is computed: what is refused is no test of anything else."""
    rng = random.Random(0)
    outcomes: list[str] = []
    while len(outcomes) < 6 or "right" not in outcomes:
        outcomes.append(check({"family": family, **FAMILIES[family][0](rng)}))
        assert len(outcomes) < 60, outcomes


def test_every_family_is_drawn() -> None:
    rng = random.Random(0)
    assert {make_case(rng)["family"] for _ in range(1000)} == set(FAMILIES)
