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
    """Some are computed: what is refused is no test of anything else."""
    rng = random.Random(0)
    outcomes = [check({"family": family, **FAMILIES[family][0](rng)}) for _ in range(8)]
    assert "right" in outcomes, outcomes


def test_every_family_is_drawn() -> None:
    rng = random.Random(0)
    assert {make_case(rng)["family"] for _ in range(300)} == set(FAMILIES)
